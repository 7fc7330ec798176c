"""Checkpoints: Hugging Face model folders, with what training needs to go on beside the weights.

    checkpoints/step_0000250/   the model, its code, its tokenizer
        training_state/
            optimizer.pt        the optimizer's moments and, under fp16, the loss scaler's state
            state.json          what `TrainingState` says
            checksums.json      of all the other files; a checkpoint without it is not one to resume from

A checkpoint takes its name when all of it is on disk (`core.files.create_folder_atomically`). There is no random state
in it: what is drawn in training follows from the seed and the step.
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

from ..core.errors import RefusedError, UserError, raise_if_refused
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
# Parts of an experiment that are no use to a reader, and what it means that they differ.
FINGERPRINTS = {"data": "the training data changed", "tokenizer": "the tokenizer changed"}
OPTIMIZER_NAME, STATE_NAME, CHECKSUMS_NAME = "optimizer.pt", "state.json", "checksums.json"


@dataclasses.dataclass(frozen=True)
class TrainingState:
    """Where a run stands, beside its weights and its optimizer.

    Attributes:
        step: completed updates.
        tokens: of the training split that these steps stand for.
        experiment: what a resumed run may not change.
        skips: updates that the run passes over.
        tracker_run_id: by which a tracker knows the run again.
        is_evaluated: what is due at this step has been measured; not so where the run was asked to stop before.
        micro_batch_size: sequences that a device took at once, and `hardware` on which they fitted. The size decides
            the last bits of an update.
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
    """Write `folder/step_NNNNNNN`, whole or not at all, and return its path.

    Args:
        model: the plain module, neither compiled nor distributed.
        scaler: of the loss, under fp16.
    """
    path = folder / f"step_{state.step:07d}"
    with create_folder_atomically(path) as temporary:
        save_model(temporary, model, tokenizer)
        state_folder = temporary / TRAINING_STATE
        state_folder.mkdir()
        moving_parts = {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict() if scaler else None}
        torch.save(moving_parts, state_folder / OPTIMIZER_NAME)
        skips = [[skip.start, skip.stop] for skip in state.skips]
        write_json(state_folder / STATE_NAME, dataclasses.asdict(state) | {"skips": skips})
        write_json(state_folder / CHECKSUMS_NAME, _compute_checksums(temporary))
    return path


def prune_checkpoints(folder: Path, keep: int, keep_weights_every: int) -> None:
    """Delete all checkpoints but the newest `keep` (0: delete none), never the last one that is whole.

    Of those at a multiple of `keep_weights_every` steps (0: of none) the model stays, without its training state.
    """
    clear_unfinished(folder)
    for old in list_checkpoints(folder)[:-keep] if keep else ():
        if keep_weights_every and read_step(old) % keep_weights_every == 0:
            (old / TRAINING_STATE / CHECKSUMS_NAME).unlink(missing_ok=True)  # first, so that no half counts as whole
            sync_folder(old / TRAINING_STATE)
            shutil.rmtree(follow_links(old / TRAINING_STATE))
        else:
            remove_folder(old)


def clear_unfinished(folder: Path) -> None:
    """Remove what a process that was killed while it wrote or deleted a model left in a run's checkpoint folder."""
    for leftover in folder.glob(f"step_*{TEMPORARY_SUFFIX}"):
        clear_leftovers(leftover.with_suffix(""))


def remove_models(folder: Path, after: int) -> None:
    """Delete the models in a run's checkpoint folder that had more than `after` updates; -1: all of them."""
    clear_unfinished(folder)
    for model in list_models(folder):
        if read_step(model) > after:
            remove_folder(model)


def list_models(folder: Path) -> list[Path]:
    """Return the folders `step_N` in a run's checkpoint folder, oldest first: checkpoints, and models kept of them."""
    paths = folder.iterdir() if folder.is_dir() else ()  # unlike `glob`, not silent of a folder that may not be read
    found = (path for path in paths if re.fullmatch(r"step_\d{7,15}", path.name))
    return sorted((path for path in found if path.is_dir()), key=read_step)


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints that training can go on from, oldest first."""
    return [path for path in list_models(folder) if (path / TRAINING_STATE).is_dir()]


def read_step(checkpoint: Path) -> int:
    """Return the step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix("step_"))


def is_own_checkpoint(checkpoint: str | Path, folder: Path) -> bool:
    """Tell whether a checkpoint is one of a run's own, given the run's checkpoint folder."""
    place = follow_links(checkpoint)
    return place.parent == follow_links(folder) or place in map(follow_links, folder.glob("step_*"))


def choose_checkpoint(requested: str, folder: Path, say: Callable[[str], None]) -> Path | None:
    """Return the checkpoint to go on from, `None` to start at step 0.

    Args:
        requested: `auto` for the newest whole one in `folder`, `never`, or a checkpoint's own path. A path outside
            `folder` is where a run forks off another: once it has a newer one of its own, that is it.
        say: told of each damaged one that is passed over, and of one that is newer than the path.

    Raises:
        UserError: the one asked for is damaged, or all in `folder` are.
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
    say(f"the run goes on from its own {newest}, newer than {given}: another --run_name begins there once more")
    return newest


def _find_newest(folder: Path, say: Callable[[str], None]) -> Path | None:
    try:
        found = list_checkpoints(folder)
    except OSError as error:
        raise_if_refused(error, folder)
        raise
    for checkpoint in reversed(found):
        try:
            check_whole(checkpoint)
        except RefusedError:  # to go on from an older one would be to make the steps since then again
            raise
        except UserError as error:
            say(f"passed over a checkpoint: {error}")
        else:
            return checkpoint
    if found:
        raise UserError(
            f"every checkpoint in {folder} is damaged: give another --run_name, or --resume_from_checkpoint never to "
            "start again in their place"
        )
    return None


def check_whole(checkpoint: Path) -> None:
    """Compare a checkpoint's files with their checksums.

    Raises:
        RefusedError: the machine does not let them be read.
        UserError: it is none, or a file is missing, changed, or was not there when it was saved.
    """
    state_folder = checkpoint / TRAINING_STATE
    for folder in (checkpoint, state_folder):  # what may not be opened would count as missing
        raise_if_refused(None, folder)
    if not state_folder.is_dir():
        raise UserError(
            f"{checkpoint} is not a checkpoint to resume from: give a folder like runs/NAME/checkpoints/step_0001000, "
            "or --init_from to start a new run from its weights"
        )
    try:
        saved = dict(json.loads((state_folder / CHECKSUMS_NAME).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise_if_refused(error, checkpoint)
        raise UserError(f"{checkpoint} is damaged: {CHECKSUMS_NAME} cannot be read ({error})") from error
    try:
        found = _compute_checksums(checkpoint)  # opens only files that lie there, even if the list names others
    except OSError as error:
        raise_if_refused(error, checkpoint)
        raise
    for name in sorted(saved.keys() | found.keys()):
        if name not in found:
            raise UserError(f"{checkpoint} is damaged: {name} is missing")
        if name not in saved:
            raise UserError(f"{checkpoint} is damaged: {name} is not one of its files")
        if found[name] != saved[name]:
            raise UserError(f"{checkpoint} is damaged: {name} is not what was saved")


def load_state(checkpoint: Path) -> TrainingState:
    """Read where the run of a checkpoint stood.

    Raises:
        UserError: it cannot be read.
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
        raise_if_refused(error, path)
        raise UserError(
            f"{checkpoint} is not a checkpoint of this version: cannot read {path.name}: {error}"
        ) from error


def check_experiment(checkpoint: Path, saved: dict[str, Any], experiment: dict[str, Any]) -> None:
    """Raise a `UserError` where a run that is resumed would not be the one that was saved."""
    different = [
        FINGERPRINTS.get(name, f"{name} was {saved.get(name)} and is now {value}")
        for name, value in experiment.items()
        if saved.get(name) != value
    ]
    if different:
        other_length = saved.get("max_steps") != experiment.get("max_steps")
        why = "Another length changes a cosine from its start, but not --lr_schedule constant or wsd. "
        raise UserError(
            f"{checkpoint} is of another experiment: {', '.join(different)}. {why if other_length else ''}Give "
            f"another --run_name, with --init_from {shlex.quote(str(checkpoint))} to start from these weights, or "
            "--resume_from_checkpoint never to replace that run"
        )


def load_optimizer_state(
    checkpoint: Path, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None = None
) -> None:
    """Give the optimizer its moments and update counts, and the loss scaler its scale, as a checkpoint has them.

    Raises:
        UserError: they cannot be read, or not without running code.
    """
    try:
        saved = torch.load(checkpoint / TRAINING_STATE / OPTIMIZER_NAME, "cpu", weights_only=True)
        optimizer.load_state_dict(saved["optimizer"])
        if scaler is not None and saved["scaler"] is not None:
            scaler.load_state_dict(saved["scaler"])
    except Exception as error:  # a pickle that is none of ours can raise anything
        raise_if_refused(error, checkpoint)
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{checkpoint} is damaged: {OPTIMIZER_NAME} cannot be read ({reason})") from error


def check_reload(checkpoint: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
    """Check that a checkpoint gives back the weights and the optimizer's state, to the last bit.

    Raises:
        AssertionError: it does not; also under `python -O`.
    """
    reloaded = type(model).from_pretrained(checkpoint, dtype=model.dtype)
    saved = torch.load(checkpoint / TRAINING_STATE / OPTIMIZER_NAME, "cpu", weights_only=True)["optimizer"]
    is_exact = {"rtol": 0, "atol": 0, "check_device": False}
    assert_close(reloaded.state_dict(), model.state_dict(), **is_exact)
    assert_close(saved["state"], optimizer.state_dict()["state"], **is_exact)


def _compute_checksums(checkpoint: Path) -> dict[str, str]:
    """Return the checksums of a checkpoint's files, except `checksums.json`, by their paths in its folder."""
    state_folder = checkpoint / TRAINING_STATE
    found = {*checkpoint.rglob("*"), *state_folder.rglob("*")}  # no glob enters a link, as the second may be
    files = sorted(path for path in found if path.is_file() and path != state_folder / CHECKSUMS_NAME)
    return {path.relative_to(checkpoint).as_posix(): compute_checksum(path) for path in files}
