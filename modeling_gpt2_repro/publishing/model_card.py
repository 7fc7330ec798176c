"""The model card of a run, filled in from the run's files (template: `model_card.md`)."""

import html
import json
import math
import re
import shutil
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData
from safetensors import safe_open

from ..core.files import open_atomically
from ..data.shards import Manifest
from ..evaluation.hellaswag_data import name_items
from ..plots.references import read_manifest
from ..training.config import TrainingConfig
from ..training.console import format_duration
from ..training.metrics import Metrics, find_last_validation, format_validation, merge_metrics, read_json_object
from ..training.run_folder import RunFolder
from .reproduction import list_commands, read_versions, shorten
from .scores import (
    Score,
    build_eval_results,
    choose_validation_split_scores,
    describe_score,
    list_scores,
    read_training_scores,
    render_eval_results,
)

TEMPLATE = Path(__file__).with_name("model_card.md")
NOT_RECORDED = "not recorded"
CARD, CURVES = "README.md", RunFolder("").curves.name
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
Rows = list[tuple[str, str]]


def write_model_card(folder: Path, run_folder: RunFolder) -> None:
    """Write the card, curves and score files of the finished model into its folder."""
    if run_folder.curves.is_file():
        shutil.copyfile(run_folder.curves, folder / CURVES)
    for name, text in describe_model(folder, run_folder).items():
        (folder / name).parent.mkdir(exist_ok=True)
        with open_atomically(folder / name) as stream:
            stream.write(text)


def describe_model(
    folder: Path, run_folder: RunFolder, *, repo_id: str | None = None, step: int | None = None
) -> dict[str, str]:
    """Return the contents of a model's card and score files, keyed by path in the model's folder.

    The card contains less if the records or the data of the run are gone.

    Args:
        folder: the model's folder.
        repo_id: the repository to publish to, if any.
        step: the step of a checkpoint, whose card contains nothing later; `None` for the finished model.

    Raises:
        UserError: the run's settings are missing or damaged.
    """
    config, lines = run_folder.read_config(), run_folder.read_metrics(step)
    manifest, last = read_manifest(config), merge_metrics(lines, step)
    in_training = read_training_scores(last)
    afterwards = list_scores(run_folder, repo_id) if step is None else []
    scores = choose_validation_split_scores(in_training, afterwards, config)
    name = repo_id.rpartition("/")[2] if repo_id else config.run_name
    results = [*list_losses(config, lines, last), *list_score_rows(config, in_training, afterwards)]
    versions = read_versions(run_folder)
    card = TEMPLATE.read_text(encoding="utf-8").format(
        metadata=build_metadata(name, config, manifest, last, scores).to_yaml(),
        name=name,
        origin="random weights" if config.init_from == "scratch" else f"`{shorten(config.init_from)}`",
        progress=describe_progress(last, step),
        curves=f"\n![Curves of the run]({CURVES})\n" if run_folder.curves.is_file() else "",
        results=format_table(results) or "Nothing was measured.",
        data=format_table(list_data(config, manifest)),
        n_parameters=count_parameters(folder),
        shape=read_shape(folder),
        config=config,
        **describe_training(config, lines, last),
        prompt=quote_text(repr(config.sample_prompt)),
        samples=quote_samples(run_folder, last) or "No samples were drawn.",
        folder=json.dumps(repo_id) if repo_id else '"."  # this folder, or its Hub id',
        commands=list_commands(config, manifest),
        versions=", ".join(f"{package} {number}" for package, number in versions.items()),
    )
    return {CARD: card, **render_eval_results(scores)}


def build_metadata(
    name: str, config: TrainingConfig, manifest: Manifest | None, last: Metrics, scores: Mapping[str, Score]
) -> ModelCardData:
    """Build a card's metadata for the Hub: kind of model, dataset, base model, and results as a `model-index`."""
    source = manifest.source if manifest else {}
    is_on_hub = all(isinstance(source.get(name), str) for name in ("id", "revision"))
    data = {
        "dataset_type": source["id"] if is_on_hub else "text",
        "dataset_name": describe_source(manifest) if manifest else Path(config.data_dir).name,
        "dataset_config": source.get("config"),
        "dataset_revision": source.get("revision"),
        "dataset_split": "validation",
    }
    kinds = {
        "val/loss": ("loss", "validation loss (nats per token)"),
        "val/bpb": ("bits_per_byte", "validation bits per UTF-8 byte"),
    }
    measured = [
        EvalResult("text-generation", metric_type=kind, metric_name=label, metric_value=last[metric], **data)
        for metric, (kind, label) in kinds.items()
        if metric in last
    ]
    base = config.init_from
    is_base_on_hub = base != "scratch" and HUB_ID.fullmatch(base) and not Path(base).exists()
    return ModelCardData(
        model_name=name,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["gpt2", "gpt2-repro"],
        datasets=[source["id"]] if is_on_hub else None,
        base_model=base if is_base_on_hub else None,
        eval_results=[*measured, *build_eval_results(scores)] or None,
    )


def describe_source(manifest: Manifest) -> str:
    """Describe the corpus of a manifest in one phrase, without paths of local files."""
    source = manifest.source
    if "files" in source:
        return f"{len(source['files'])} local file(s), {manifest.read.documents:,} documents"
    return ", ".join(shorten(str(value)) for value in source.values() if value is not None)


def describe_progress(last: Metrics, step: int | None) -> str:
    """Return a paragraph with the model's number of updates; empty if they were not recorded."""
    if step is not None:
        return f"\n**This is an intermediate checkpoint after {step:,} updates.**\n"
    return f"\nThe run ended after {last['step']:,} updates.\n" if last else ""


def list_losses(config: TrainingConfig, lines: Sequence[Metrics], last: Metrics) -> Rows:
    """Return table rows for the train and validation losses."""
    rows: Rows = []
    validation = find_last_validation(lines)
    if "train/loss" in last:
        rows.append(("train loss, last update", f"{last['train/loss']:.4f} nats per token"))
    if validation is not None:
        when = "" if validation["step"] == last["step"] else f" of an earlier model, at step {validation['step']:,}"
        rows.append((f"validation loss{when}", format_validation(validation)))
        rows.append(("validation tokens", f"first {config.eval_tokens:,} of the split, or all if it has fewer"))
    return rows


def list_score_rows(config: TrainingConfig, in_training: Mapping[str, Score], afterwards: Iterable[Score]) -> Rows:
    """Return table rows for the HellaSwag scores measured in training, then for those by eval_hellaswag.py."""
    items = name_items(config.hellaswag_file, config.hellaswag_limit)
    of_run = [
        (f"{items}: acc_norm, protocol `{protocol}`, in training", describe_score(score, "acc_norm"))
        for protocol, score in in_training.items()
    ]
    own = [
        (f"{score['data']}: {metric}, protocol `{score['protocol']}`", describe_score(score, metric))
        for score in afterwards
        for metric in ("acc_norm", "acc")
    ]
    return of_run + own


def list_data(config: TrainingConfig, manifest: Manifest | None) -> Rows:
    """Return table rows for the data."""
    if manifest is None:
        return [("source", f"`{Path(config.data_dir).name}`, a folder without a manifest")]
    train, val, tokenizer = manifest.train, manifest.val, f"`{shorten(manifest.tokenizer)}`"
    if manifest.tokenizer.startswith((".", "/", "~")):
        tokenizer = f"saved with the model, from {tokenizer}"
    return [
        ("source", describe_source(manifest)),
        ("training split", f"{train.tokens:,} tokens, {train.documents:,} documents, {train.bytes:,} bytes of text"),
        ("validation split", f"{val.tokens:,} tokens, {val.documents:,} documents, the start of the source"),
        ("order", f"documents shuffled, seed {manifest.seed}" if manifest.shuffled else "as in the source"),
        ("tokenizer", f"{tokenizer}, {manifest.vocab_size:,} ids"),
    ]


def read_shape(folder: Path) -> Mapping[str, str]:
    """Return the integers in a model's configuration, formatted, keyed by name."""
    config = read_json_object(folder / "config.json")
    numbers = {name: f"{value:,}" for name, value in config.items() if isinstance(value, int)}
    return defaultdict(lambda: NOT_RECORDED, numbers)


def count_parameters(folder: Path) -> str:
    """Count the parameters in a model's weights."""
    n_parameters = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="np") as weights:
            n_parameters += sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
    return f"{n_parameters:,} (tied embedding counted once)" if n_parameters else NOT_RECORDED


def describe_training(config: TrainingConfig, lines: Sequence[Metrics], last: Metrics) -> dict[str, str]:
    """Return the facts about training that are not settings, keyed by their names in the template."""
    decay = f"{config.lr_schedule} to {config.min_lr_ratio:g} of the peak"
    autocast = f"{config.mixed_precision} autocast where supported, weights and optimizer state in float32"
    facts = {
        "updates": f"{last['step']:,}, each of {config.tokens_per_step:,} tokens" if last else NOT_RECORDED,
        "tokens_seen": NOT_RECORDED,
        "schedule": "constant" if config.lr_schedule == "constant" else decay,
        "precision": "float32" if config.mixed_precision == "no" else autocast,
        "time": NOT_RECORDED,
    }
    if "train/tokens" in last and "train/epoch" in last:
        facts["tokens_seen"] = f"{last['train/tokens']:,.0f} ({last['train/epoch']:.3f} epochs)"
    rates = [line["train/tokens_per_second"] for line in lines if line.get("train/tokens_per_second", 0) > 0]
    if rates:
        seconds = sum(config.tokens_per_step / rate for rate in rates)
        facts["time"] = f"{format_duration(seconds)} of updates, excluding evaluations"
    return facts


def format_table(rows: Rows) -> str:
    """Format rows of name and value as a Markdown table, or return an empty string if there are none."""
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]) if rows else ""


def quote_samples(run_folder: RunFolder, last: Metrics) -> str:
    """Return the newest samples up to a model's step, each as a quoted paragraph."""
    end = last.get("step", math.inf)
    samples = [sample for sample in run_folder.read_samples() if sample["step"] <= end]
    newest = max((sample["step"] for sample in samples), default=None)
    return "\n\n".join(f"> {quote_text(str(each.get('text')))}" for each in samples if each["step"] == newest)


def quote_text(text: str) -> str:
    """Return text on one line, escaped so that Markdown shows it literally."""
    return re.sub(r"([\\`*_\[\]|#~$])", r"\\\1", html.escape(" ".join(text.split()), quote=False))
