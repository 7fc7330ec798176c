"""The model card of a finished run, written from its files."""

import shlex
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from modeling_gpt2_repro.data.shards import Manifest, load_manifest
from modeling_gpt2_repro.files import open_atomically
from modeling_gpt2_repro.reporting.run_folder import (
    describe_validation,
    merge_metrics,
    name_hellaswag_items,
    read_settings,
)
from modeling_gpt2_repro.training.config import TrainingConfig
from modeling_gpt2_repro.training.tracking import SAMPLES, read_json_lines

VERSIONED_PACKAGES = ("torch", "transformers", "accelerate", "tokenizers", "numpy")


def write_model_card(folder: Path, run_folder: Path) -> None:
    """Write `README.md` into a published model folder, from the configuration and the record of its run."""
    config = read_settings(run_folder)
    # A finished model is worth its card also when the record of its run was lost.
    last = merge_metrics(run_folder)
    lines = read_json_lines(run_folder / SAMPLES)
    samples = [str(line.get("text")) for line in lines if line["step"] == last.get("step")]
    with open_atomically(folder / "README.md") as stream:
        stream.write(render_model_card(config, last, samples, load_manifest(config["data_dir"])))


def render_model_card(
    config: dict[str, Any], last: dict[str, float], samples: list[str], manifest: Manifest | None
) -> str:
    """Return the card's text: the Hub's metadata, then what was trained on what, with which result, and how to use it.

    Args:
        config: the run's settings.
        last: the last value of every metric.
        samples: texts of the finished model.
        manifest: of the data; `None` where it has none.
    """
    source = describe_source(manifest) if manifest else config["data_dir"]
    metadata = ModelCardData(library_name="transformers", pipeline_tag="text-generation", tags=["gpt2", "gpt2-repro"])
    rows = [
        ("data", source),
        ("steps", f"{last['step']:,} of {config['tokens_per_step']:,} tokens" if last else "not recorded"),
        ("sequence length", f"{config['sequence_length']:,}"),
        ("learning rate", f"{config['learning_rate']:g}, {config['lr_schedule']}"),
    ]
    if "train/tokens" in last and "train/epoch" in last:
        rows.append(("training tokens seen", f"{last['train/tokens']:,.0f} ({last['train/epoch']:.3f} epochs)"))
    if "train/loss" in last:
        rows.append(("train loss", f"{last['train/loss']:.4f}"))
    if "val/loss" in last:
        rows.append(("validation loss", describe_validation(last)))
    if "hellaswag/acc_norm" in last:
        name = f"{name_hellaswag_items(config)}: acc_norm, original protocol"
        rows.append((name, f"{last['hellaswag/acc_norm']:.4f}"))
    defaults = asdict(TrainingConfig())
    command = "python train.py" + "".join(
        f" --{name}={shlex.quote(str(value))}" for name, value in config.items() if value != defaults[name]
    )
    versions = ", ".join(f"{package} {version(package)}" for package in VERSIONED_PACKAGES)
    origin = "random weights" if config["init_from"] == "scratch" else f"`{Path(config['init_from']).name}`"
    parts = [
        f"---\n{metadata.to_yaml()}\n---\n",
        f"# {config['run_name']}\n",
        f"A GPT-2 model trained from {origin} by the GPT-2 reproduction.\n",
        "| | |\n|---|---|\n" + "".join(f"| {name} | {value} |\n" for name, value in rows),
        "## Use\n",
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'folder = "."  # this folder, or its Hub id\n'
        "model = AutoModelForCausalLM.from_pretrained(folder)\n"
        "tokenizer = AutoTokenizer.from_pretrained(folder)\n```\n",
        "This opens as transformers' own `GPT2LMHeadModel`; with `trust_remote_code=True` it opens as the class it "
        "was trained with, from the two code files beside the weights.\n",
        "## Samples\n",
        "".join(f"> {' '.join(text.split())}\n\n" for text in samples) or "None were drawn.\n",
        "## Limits\n",
        "A base model: it continues text and follows no instructions. It repeats what its training text says, errors "
        "and prejudices included, and states falsehoods fluently.\n",
        "## Reproduce\n",
        f"```\n{command}\n```\n",
        f"With {versions}.\n",
    ]
    return "\n".join(parts)


def describe_source(manifest: Manifest) -> str:
    """Name the corpus of a manifest in one phrase, without the paths of local files."""
    source = manifest.source
    if "files" in source:
        return f"{len(source['files'])} local file(s), {manifest.read.documents:,} documents"
    return ", ".join(str(value) for value in source.values() if value is not None)
