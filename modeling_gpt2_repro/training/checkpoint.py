"""Checkpoints: Hugging Face model folders that also contain the training state.

    checkpoints/step_0000250/   model, code, tokenizer
        training_state/
            optimizer.pt        optimizer state and, under fp16, the loss scaler's state
            state.json          the fields of `TrainingState`
            checksums.json      checksums of all other files; without it a checkpoint is incomplete

A checkpoint gets its final name once all of it is on disk (`core.files.create_folder_atomically`). It contains no RNG
state, because all random numbers of training are functions of the seed and the step.
"""

import dataclasses
import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.testing import assert_close
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..core.errors import UnreadableError, UserError, raise_if_unreadable
from ..core.files import (
    TEMPORARY_SUFFIX,
    clear_leftovers,
    compute_checksum,
    create_folder_atomically,
    follow_links,
    remove_folder,
    sync_folder,
    write_json,
)
from ..model.folder import save_model

TRAINING_STATE = "training_state"
# Fingerprints, which mean nothing to a reader, with the message for a mismatch.
FINGERPRINTS = {"data": "the training data changed", "tokenizer": "the tokenizer changed"}
OPTIMIZER_NAME, STATE_NAME, CHECKSUMS_NAME = "optimizer.pt", "state.json", "checksums.json"


@dataclasses.dataclass(frozen=True)
class TrainingState:
    """The state of a run beyond its weights and its optimizer.

    Attributes:
        step: completed updates.
        tokens: `step` times the tokens of a step.
        experiment: settings and fingerprints that may not change on resume.
        skips: ranges of updates to skip.
        tracker_run_id: the run's id in trackers.
        is_evaluated: whether the evaluations due at this step were made; not if the run was stopped before them.
        micro_batch_size, hardware: sequences per device and micro-step, and the hardware on which they fit. The size
            determines the last bits of an update.
    """

    step: int
    tokens: int
    experiment: dict[str, Any]
    skips: list[range]
    tracker_run_id: str
    is_evaluated: bool = True
    micro_batch_size: int | None = None
    hardware: str | None = None


def save_checkpoint(
    folder: Path,
    state: TrainingState,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None = None,
) -> Path:
    """Write `folder/step_NNNNNNN` atomically, and return its path.

    Args:
        model: the plain module, neither compiled nor wrapped in `DistributedDataParallel`.
        scaler: the loss scaler, under fp16.
    """
    path = folder / f"step_{state.step:07d}"
    with create_folder_atomically(path) as temporary:
        save_model(temporary, model, tokenizer)
        state_folder = temporary / TRAINING_STATE
        state_folder.mkdir()
        states = {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict() if scaler else None}
        torch.save(states, state_folder / OPTIMIZER_NAME)
        skips = [[skip.start, skip.stop] for skip in state.skips]
        write_json(state_folder / STATE_NAME, dataclasses.asdict(state) | {"skips": skips})
        write_json(state_folder / CHECKSUMS_NAME, _compute_checksums(temporary))
    return path


def prune_checkpoints(folder: Path, keep: int, keep_weights_every: int) -> None:
    """Delete all but the newest `keep` checkpoints (0: keep all).

    At multiples of `keep_weights_every` steps (0: none) only the training state is deleted, and the model stays.
    """
    clear_unfinished(folder)
    for old in list_checkpoints(folder)[:-keep] if keep else ():
        if keep_weights_every and read_step(old) % keep_weights_every == 0:
            # The checksums first: a partial training state must not look complete.
            (old / TRAINING_STATE / CHECKSUMS_NAME).unlink(missing_ok=True)
            sync_folder(old / TRAINING_STATE)
            shutil.rmtree(follow_links(old / TRAINING_STATE))
        else:
            remove_folder(old)


def clear_unfinished(folder: Path) -> None:
    """Remove leftovers of processes that were killed while they wrote or deleted a model in `folder`."""
    for leftover in folder.glob(f"step_*{TEMPORARY_SUFFIX}"):
        clear_leftovers(leftover.with_suffix(""))


def remove_models(folder: Path, after: int) -> None:
    """Delete the models in `folder` with more than `after` updates; -1 deletes all."""
    clear_unfinished(folder)
    for model in list_models(folder):
        if read_step(model) > after:
            remove_folder(model)


def list_models(folder: Path) -> list[Path]:
    """Return the `step_N` folders in `folder`, oldest first: checkpoints, and models without training state."""
    paths = folder.iterdir() if folder.is_dir() else ()  # unlike `glob`, raises if the folder cannot be read
    found = (path for path in paths if re.fullmatch(r"step_\d{7,15}", path.name))
    return sorted((path for path in found if path.is_dir()), key=read_step)


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints that training can resume from, oldest first."""
    return [path for path in list_models(folder) if (path / TRAINING_STATE).is_dir()]


def read_step(checkpoint: Path) -> int:
    """Return the step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix("step_"))


def is_own_checkpoint(checkpoint: str | Path, folder: Path) -> bool:
    """Return whether a checkpoint belongs to the run whose checkpoint folder is `folder`."""
    place = follow_links(checkpoint)
    return place.parent == follow_links(folder) or place in map(follow_links, folder.glob("step_*"))


def choose_checkpoint(requested: str, folder: Path, say: Callable[[str], None]) -> Path | None:
    """Return the checkpoint to resume from, or `None` to start at step 0.

    Args:
        requested: `auto` for the newest undamaged checkpoint in `folder`, `never`, or a path. A path outside `folder`
            forks the run from another one; a newer checkpoint in `folder` then takes precedence.
        say: receives a line for each damaged checkpoint that is skipped, and for a newer one that takes precedence.

    Raises:
        UserError: the requested checkpoint, or every checkpoint in `folder`, is damaged.
    """
    if requested == "never":
        return None
    if requested == "auto":
        return _find_newest(folder, say)
    given = Path(requested)
    check_whole(given)
    newest = None if is_own_checkpoint(given, folder) else _find_newest(folder, say)
    if newest is None or read_step(newest) <= load_state(given).step:
        return given
    say(f"resuming from {newest}, which is newer than {given}: use another --run_name to start from {given} again")
    return newest


def _find_newest(folder: Path, say: Callable[[str], None]) -> Path | None:
    try:
        found = list_checkpoints(folder)
    except OSError as error:
        raise_if_unreadable(error, folder)
        raise
    for checkpoint in reversed(found):
        try:
            check_whole(checkpoint)
        except UnreadableError:  # it may be intact, and an older one would repeat the steps since
            raise
        except UserError as error:
            say(f"skipped a checkpoint: {error}")
        else:
            return checkpoint
    if found:
        raise UserError(
            f"every checkpoint in {folder} is damaged: use another --run_name, or --resume_from_checkpoint never to "
            "start over and replace them"
        )
    return None


def check_whole(checkpoint: Path) -> None:
    """Check a checkpoint's files against their checksums.

    Raises:
        UnreadableError: the operating system refuses to read them.
        UserError: not a checkpoint, or a file is missing, changed or extra.
    """
    state_folder = checkpoint / TRAINING_STATE
    for folder in (checkpoint, state_folder):  # otherwise an unreadable folder would look like a missing one
        raise_if_unreadable(None, folder)
    if not state_folder.is_dir():
        raise UserError(
            f"{checkpoint} is not a checkpoint to resume from: use a folder like runs/NAME/checkpoints/step_0001000, "
            "or --init_from to start a new run from its weights"
        )
    try:
        saved = dict(json.loads((state_folder / CHECKSUMS_NAME).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise_if_unreadable(error, checkpoint)
        raise UserError(f"{checkpoint} is damaged: {CHECKSUMS_NAME} cannot be read ({error})") from error
    try:
        found = _compute_checksums(checkpoint)  # opens only files inside the checkpoint, whatever the list names
    except OSError as error:
        raise_if_unreadable(error, checkpoint)
        raise
    for name in sorted(saved.keys() | found.keys()):
        if name not in found:
            raise UserError(f"{checkpoint} is damaged: {name} is missing")
        if name not in saved:
            raise UserError(f"{checkpoint} is damaged: {name} does not belong to it")
        if found[name] != saved[name]:
            raise UserError(f"{checkpoint} is damaged: the checksum of {name} does not match")


def load_state(checkpoint: Path) -> TrainingState:
    """Load the state of a checkpoint's run.

    Raises:
        UserError: the state cannot be read.
    """
    path = checkpoint / TRAINING_STATE / STATE_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if int(content["step"]) < 0:
            raise ValueError(f"step is {content['step']}")
        return TrainingState(
            step=int(content["step"]),
            tokens=int(content["tokens"]),
            experiment=dict(content["experiment"]),
            skips=[range(int(start), int(stop)) for start, stop in content["skips"]],
            tracker_run_id=str(content["tracker_run_id"]),
            is_evaluated=bool(content["is_evaluated"]),
            micro_batch_size=content.get("micro_batch_size"),  # the first version did not record these two
            hardware=content.get("hardware"),
        )
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise_if_unreadable(error, path)
        raise UserError(
            f"{checkpoint} is not a checkpoint of this version: cannot read {path.name}: {error}"
        ) from error


def check_experiment(checkpoint: Path, saved: dict[str, Any], experiment: dict[str, Any]) -> None:
    """Raise a `UserError` that names what differs between a checkpoint's experiment and the one to resume."""
    different = [
        FINGERPRINTS.get(name, f"{name} was {saved.get(name)} and is now {value}")
        for name, value in experiment.items()
        if saved.get(name) != value
    ]
    if different:
        other_length = saved.get("max_steps") != experiment.get("max_steps")
        why = "A cosine schedule cannot change its length; --lr_schedule constant and wsd can be prolonged. "
        raise UserError(
            f"{checkpoint} belongs to another experiment: {', '.join(different)}. {why if other_length else ''}Use "
            f"another --run_name, with --init_from {shlex.quote(str(checkpoint))} to start from these weights, or "
            "--resume_from_checkpoint never to replace that run"
        )


def load_optimizer_state(
    checkpoint: Path, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None = None
) -> None:
    """Load the states of the optimizer and of the loss scaler in-place.

    Raises:
        UserError: the file cannot be read, or contains anything but tensors and plain values.
    """
    try:
        saved = torch.load(checkpoint / TRAINING_STATE / OPTIMIZER_NAME, "cpu", weights_only=True)
        optimizer.load_state_dict(saved["optimizer"])
        if scaler is not None and saved["scaler"] is not None:
            scaler.load_state_dict(saved["scaler"])
    except Exception as error:  # a foreign pickle can raise anything
        raise_if_unreadable(error, checkpoint)
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{checkpoint} is damaged: {OPTIMIZER_NAME} cannot be read ({reason})") from error


def check_reload(checkpoint: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
    """Check that a checkpoint restores the weights and the optimizer's state bit for bit.

    Raises:
        AssertionError: a value differs; raised under `python -O`, too.
    """
    reloaded = type(model).from_pretrained(checkpoint, dtype=model.dtype)
    saved = torch.load(checkpoint / TRAINING_STATE / OPTIMIZER_NAME, "cpu", weights_only=True)["optimizer"]
    is_exact = {"rtol": 0, "atol": 0, "check_device": False}
    assert_close(reloaded.state_dict(), model.state_dict(), **is_exact)
    assert_close(saved["state"], optimizer.state_dict()["state"], **is_exact)


def _compute_checksums(checkpoint: Path) -> dict[str, str]:
    """Return the checksum of each file of a checkpoint except `checksums.json`, keyed by relative path."""
    state_folder = checkpoint / TRAINING_STATE
    found = {*checkpoint.rglob("*"), *state_folder.rglob("*")}  # `rglob` does not follow `training_state` if a link
    files = sorted(path for path in found if path.is_file() and path != state_folder / CHECKSUMS_NAME)
    return {path.relative_to(checkpoint).as_posix(): compute_checksum(path) for path in files}
