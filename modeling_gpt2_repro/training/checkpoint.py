"""Checkpoints: Hugging Face model folders, with what training needs to go on beside the weights."""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from modeling_gpt2_repro.errors import UserError
from modeling_gpt2_repro.files import create_folder_atomically, write_json

TRAINING_STATE = "training_state"


def save_checkpoint(
    folder: Path,
    step: int,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    optimizer: torch.optim.Optimizer,
    experiment: dict[str, Any],
    skips: Sequence[range],
    keep: int,
) -> None:
    """Write `folder/step_NNNNNNN`, whole or not at all, then delete all but the newest `keep` (0: delete none).

    Args:
        step: completed updates.
        model: the plain module, neither compiled nor distributed.
        experiment: what a resumed run may not change; kept as JSON.
        skips: updates that the run passes over.
    """
    with create_folder_atomically(folder / f"step_{step:07d}") as temporary:
        save_model(temporary, model, tokenizer)
        (temporary / TRAINING_STATE).mkdir()
        torch.save(optimizer.state_dict(), temporary / TRAINING_STATE / "optimizer.pt")
        state = {"step": step, "experiment": experiment, "skips": [[skip.start, skip.stop] for skip in skips]}
        write_json(temporary / TRAINING_STATE / "state.json", state)
    if keep:
        for old in list_checkpoints(folder)[:-keep]:
            shutil.rmtree(old)


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the whole checkpoints in a run's checkpoint folder, oldest first."""
    return sorted(path for path in folder.glob("step_*") if re.fullmatch(r"step_\d{7,}", path.name))


def choose_checkpoint(requested: str, folder: Path) -> Path | None:
    """Return the checkpoint to go on from, `None` to start at step 0.

    Args:
        requested: `auto` for the newest in `folder`, `never`, or a checkpoint's own path.
    """
    if requested == "never":
        return None
    if requested == "auto":
        return next(reversed(list_checkpoints(folder)), None)
    return Path(requested)


def load_progress(checkpoint: Path, experiment: dict[str, Any]) -> tuple[int, list[range]]:
    """Return the step of a checkpoint of the same experiment, and the updates that it was told to pass over.

    Raises:
        UserError: the folder is not a checkpoint, or one of another experiment.
    """
    try:
        state = json.loads((checkpoint / TRAINING_STATE / "state.json").read_text(encoding="utf-8"))
        step, saved = int(state["step"]), state["experiment"]
        skips = [range(start, stop) for start, stop in state["skips"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{checkpoint} is not a checkpoint to resume from ({error}): give a folder like "
            "runs/NAME/checkpoints/step_0001000, or --init_from to start a new run from its weights"
        ) from error
    different = [
        f"{name} was {saved.get(name)} and is now {value}"
        for name, value in experiment.items()
        if saved.get(name) != value
    ]
    if different:
        raise UserError(
            f"{checkpoint} is of another experiment: {', '.join(different)}. Give another --run_name, or "
            "--resume_from_checkpoint never to replace that run"
        )
    return step, skips


def load_optimizer(checkpoint: Path, optimizer: torch.optim.Optimizer) -> None:
    """Give `optimizer` the moments and update counts of a checkpoint."""
    optimizer.load_state_dict(torch.load(checkpoint / TRAINING_STATE / "optimizer.pt", "cpu", weights_only=True))


def check_reload(checkpoint: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
    """Check that a checkpoint gives back the weights and the optimizer's state, to the last bit."""
    reloaded = type(model).from_pretrained(checkpoint, dtype=model.dtype).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(reloaded[name], tensor.cpu()), f"{name} came back from {checkpoint} as something else"
    saved = torch.load(checkpoint / TRAINING_STATE / "optimizer.pt", "cpu", weights_only=True)["state"]
    for index, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(saved[index][name]), torch.as_tensor(value).cpu()), f"{name} of {index}"


def save_model(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Write weights, configuration, the model's two code files, generation settings and the tokenizer, if any."""
    eos_token_id = tokenizer.eos_token_id if tokenizer is not None else None
    model.generation_config = GenerationConfig(
        bos_token_id=eos_token_id, eos_token_id=eos_token_id, do_sample=True, top_k=50
    )
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def save_published_model(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Write a model folder that names itself GPT-2, which is what its tensors are.

    Plain `AutoModelForCausalLM.from_pretrained(folder)` opens it as transformers' own `GPT2LMHeadModel`, with nothing
    of ours installed; with `trust_remote_code=True` the code files in it give our class. Dropout belongs to a run and
    not to the weights: it is written as 0.0.
    """
    save_model(folder, model, tokenizer)
    # to_dict and not the saved file, which leaves out what equals our defaults: stock GPT-2's dropouts default to 0.1.
    config = {name: 0.0 if name.endswith("_pdrop") else value for name, value in model.config.to_dict().items()}
    write_json(folder / "config.json", config | {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]})
