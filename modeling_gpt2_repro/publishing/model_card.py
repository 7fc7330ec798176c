"""The model card of a run, written from its files."""

import contextlib
import html
import json
import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from safetensors import safe_open

from modeling_gpt2_repro.core.errors import UserError
from modeling_gpt2_repro.core.files import open_atomically
from modeling_gpt2_repro.data.shards import Manifest, load_manifest
from modeling_gpt2_repro.evaluation.hellaswag_data import name_items
from modeling_gpt2_repro.publishing.eval_results import build_eval_results, render_eval_results
from modeling_gpt2_repro.publishing.reproduction import list_commands, read_versions, shorten
from modeling_gpt2_repro.publishing.scores import (
    choose_validation_split_scores,
    format_score,
    list_scores,
    read_training_scores,
)
from modeling_gpt2_repro.training.console import format_duration
from modeling_gpt2_repro.training.metrics import (
    find_last_validation,
    format_validation,
    merge_metrics,
    read_json_object,
)
from modeling_gpt2_repro.training.run_folder import RunFolder

CARD, CURVES = "README.md", RunFolder("").curves.name
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
LIMITS = """\
This is a base model: it continues text and follows no instructions, and nothing was done to make its words true, safe
or fair. It states falsehoods fluently. It has learned what its training text says, with its errors, its stereotypes
about people and the names that stand in it, and may repeat passages of it. It knows nothing of what was written later,
hardly any language but those of its training text, and no more context than the tokens given above. Do not let it
decide about people, and have somebody read what it writes before others rely on it."""


def write_model_card(folder: Path, run_folder: Path) -> None:
    """Write the card of the finished model into its folder, with the curves that it shows and the scores by file."""
    if (run_folder / CURVES).is_file():
        (folder / CURVES).write_bytes((run_folder / CURVES).read_bytes())
    for name, text in describe_model(folder, run_folder).items():
        (folder / name).parent.mkdir(exist_ok=True)
        with open_atomically(folder / name) as stream:
            stream.write(text)


@dataclass(frozen=True)
class Facts:
    """What is known of a model and its run.

    Attributes:
        folder: of the model.
        manifest: of the data, where they are still there.
        repo_id: where the model goes, if to the Hub.
        step: of a checkpoint, in whose card nothing later is told; `None` for the finished model.
        lines: of the run's metrics up to the model.
        last: what they say of the model.
        training_scores: HellaSwag's by protocol, measured in training.
        own_scores: those that eval_hellaswag.py measured of the finished model.
        scores: which of them are on the whole of the validation set, by protocol.
    """

    folder: Path
    run_folder: Path
    settings: dict[str, Any]
    manifest: Manifest | None
    repo_id: str | None
    step: int | None
    lines: list[dict[str, float]]
    last: dict[str, float]
    training_scores: dict[str, dict[str, Any]]
    own_scores: list[dict[str, Any]]
    scores: dict[str, dict[str, Any]]


def describe_model(
    folder: Path, run_folder: Path, *, repo_id: str | None = None, step: int | None = None
) -> dict[str, str]:
    """Return what tells of a model by its path in the model's folder: the card, and the scores in files of their own.

    A model is worth its card also when the record of its run, or its data, are gone: it then says less.

    Args:
        folder, repo_id, step: as in `Facts`.

    Raises:
        UserError: the run's settings are missing or damaged.
    """
    config = RunFolder(run_folder).read_config()
    settings = asdict(config)
    manifest = None
    with contextlib.suppress(UserError):
        manifest = load_manifest(settings["data_dir"])
    lines = RunFolder(run_folder).read_metrics(step)
    last = merge_metrics(lines, step)
    training_scores = read_training_scores(last)
    own_scores = list_scores(run_folder, repo_id) if step is None else []
    scores = choose_validation_split_scores(training_scores, own_scores, config)
    facts = Facts(
        folder, run_folder, settings, manifest, repo_id, step, lines, last, training_scores, own_scores, scores
    )
    return {CARD: render_model_card(facts), **render_eval_results(scores)}


def render_model_card(facts: Facts) -> str:
    """Return a card: the Hub's metadata, then what was trained on what, with which result, and how to use it."""
    settings, run_folder, repo_id = facts.settings, facts.run_folder, facts.repo_id
    name = repo_id.rpartition("/")[2] if repo_id else settings["run_name"]
    parts = [
        f"---\n{build_metadata(name, facts).to_yaml()}\n---\n",
        f"# {name}\n",
        _describe_origin(facts),
        f"![Curves of the run]({CURVES})\n" if (run_folder / CURVES).is_file() else "",
        "## Results\n",
        format_table(_list_results(facts)) or "Nothing was measured.\n",
        "## Data\n",
        format_table(_list_data(facts)),
        "## Model\n",
        format_table(_list_architecture(facts.folder)),
        "## Training\n",
        format_table(_list_training(facts)),
        "## Samples\n",
        f"Continuations of {quote_text(repr(settings['sample_prompt']))}, not chosen among others:\n",
        _quote_samples(facts) or "None were drawn.\n",
        "## Use\n",
        _describe_use(repo_id),
        "## Limits and biases\n",
        f"{LIMITS}\n",
        "## Reproduce\n",
        f"```bash\n{list_commands(settings, facts.manifest)}\n```\n",
        "With "
        + ", ".join(f"{package} {number}" for package, number in read_versions(run_folder).items())
        + ". The same step sees the same tokens on any number of devices.\n",
    ]
    return "\n".join(part for part in parts if part)


def build_metadata(name: str, facts: Facts) -> ModelCardData:
    """Return what the Hub reads of a card: kind of model, data set, base model, and results as a `model-index`."""
    settings, manifest, last = facts.settings, facts.manifest, facts.last
    source = manifest.source if manifest else {}
    is_on_hub = all(isinstance(source.get(name), str) for name in ("id", "revision"))
    data = {
        "dataset_type": source["id"] if is_on_hub else "text",
        "dataset_name": describe_source(manifest) if manifest else Path(settings["data_dir"]).name,
        "dataset_config": source.get("config"),
        "dataset_revision": source.get("revision"),
        "dataset_split": "validation",
    }
    measured = [
        EvalResult("text-generation", metric_type=kind, metric_name=label, metric_value=last[metric], **data)
        for metric, kind, label in (
            ("val/loss", "loss", "validation loss (nats a token)"),
            ("val/bpb", "bits_per_byte", "validation bits a UTF-8 byte"),
        )
        if metric in last
    ]
    base = settings["init_from"]
    is_base_on_hub = base != "scratch" and HUB_ID.fullmatch(base) and not Path(base).exists()
    return ModelCardData(
        model_name=name,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["gpt2", "gpt2-repro"],
        datasets=[source["id"]] if is_on_hub else None,
        base_model=base if is_base_on_hub else None,
        eval_results=[*measured, *build_eval_results(facts.scores)] or None,
    )


def describe_source(manifest: Manifest) -> str:
    """Name the corpus of a manifest in one phrase, without the paths of local files."""
    source = manifest.source
    if "files" in source:
        return f"{len(source['files'])} local file(s), {manifest.read.documents:,} documents"
    return ", ".join(shorten(str(value)) for value in source.values() if value is not None)


def format_table(rows: Iterable[tuple[str, str]]) -> str:
    """Lay out rows of a name and a value; nothing where there are none."""
    lines = [f"| {name} | {value} |\n" for name, value in rows]
    return "| | |\n|---|---|\n" + "".join(lines) if lines else ""


def quote_text(text: str) -> str:
    """Return text as one line that a Markdown page shows as it is, whatever it holds."""
    return re.sub(r"([\\`*_\[\]|#~$])", r"\\\1", html.escape(" ".join(text.split()), quote=False))


def _describe_origin(facts: Facts) -> str:
    init_from = facts.settings["init_from"]
    origin = "random weights" if init_from == "scratch" else f"`{shorten(init_from)}`"
    text = f"A GPT-2 model trained from {origin} by the GPT-2 reproduction `modeling_gpt2_repro`.\n"
    if facts.step is not None:
        text += f"\n**This is the model after {facts.step:,} updates of a run that went on.**\n"
    elif facts.last:
        text += f"\nThe run ended after {facts.last['step']:,} updates.\n"
    return text


def _list_results(facts: Facts) -> list[tuple[str, str]]:
    settings, last, validation = facts.settings, facts.last, find_last_validation(facts.lines)
    rows = []
    if "train/loss" in last:
        rows.append(("train loss, last update", f"{last['train/loss']:.4f} nats a token"))
    if validation is not None:
        when = "" if validation["step"] == last["step"] else f" of an earlier model, at step {validation['step']:,}"
        rows.append((f"validation loss{when}", format_validation(validation)))
        rows.append(("validation tokens", f"the first {settings['eval_tokens']:,} of the split, at most"))
    for protocol, score in facts.training_scores.items():
        items = name_items(settings["hellaswag_file"], settings["hellaswag_limit"])
        name = f"{items}: acc_norm, protocol `{protocol}`, in training"
        rows.append((name, format_score(score, "acc_norm")))
    for score in facts.own_scores:
        for metric in ("acc_norm", "acc"):
            rows.append((f"{score['data']}: {metric}, protocol `{score['protocol']}`", format_score(score, metric)))
    return rows


def _list_data(facts: Facts) -> list[tuple[str, str]]:
    manifest = facts.manifest
    if manifest is None:
        return [("source", f"`{Path(facts.settings['data_dir']).name}`, a folder without a manifest")]
    train, val = manifest.train, manifest.val
    order = f"shuffled by document, seed {manifest.seed}" if manifest.shuffled else "as in the source"
    return [
        ("source", describe_source(manifest)),
        ("training split", f"{train.tokens:,} tokens, {train.documents:,} documents, {train.bytes:,} bytes of text"),
        ("validation split", f"{val.tokens:,} tokens, {val.documents:,} documents, the front of the source"),
        ("order", order),
        ("tokenizer", f"{_name_tokenizer(manifest.tokenizer)}, {manifest.vocab_size:,} ids"),
    ]


def _name_tokenizer(name: str) -> str:
    return f"saved here with the model, from `{shorten(name)}`" if name.startswith((".", "/", "~")) else f"`{name}`"


def _list_architecture(folder: Path) -> list[tuple[str, str]]:
    rows = []
    n_parameters = sum(map(_count_parameters, folder.glob("*.safetensors")))
    if n_parameters:
        rows.append(("parameters", f"{n_parameters:,}, the tied embedding counted once"))
    config = read_json_object(folder / "config.json")
    for name, title in (
        ("n_layer", "blocks"),
        ("n_head", "attention heads"),
        ("n_embd", "width"),
        ("n_positions", "context (tokens)"),
        ("vocab_size", "vocabulary"),
    ):
        if isinstance(config.get(name), int):
            rows.append((title, f"{config[name]:,}"))
    return [*rows, ("format", "GPT-2's own tensor names and layout, float32")]


def _count_parameters(path: Path) -> int:
    with safe_open(path, framework="np") as weights:
        return sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118


def _list_training(facts: Facts) -> list[tuple[str, str]]:
    settings, last = facts.settings, facts.last
    rows = [
        ("updates", f"{last['step']:,} of {settings['tokens_per_step']:,} tokens" if last else "not recorded"),
        ("sequence length", f"{settings['sequence_length']:,}"),
        ("optimizer", f"AdamW, betas {settings['beta1']:g} and {settings['beta2']:g}"),
        ("weight decay", f"{settings['weight_decay']:g}, of every tensor of two dimensions"),
        ("gradient clipping", f"norm {settings['grad_clip']:g}"),
        (
            "learning rate",
            f"{settings['learning_rate']:g}, {settings['lr_schedule']} after {settings['warmup_tokens']:,} tokens of "
            f"linear warm-up, to {settings['min_lr_ratio']:g} of the peak",
        ),
        ("dropout", f"{settings['dropout']:g}"),
        ("precision", _describe_precision(settings["mixed_precision"])),
        ("seed", str(settings["seed"])),
    ]
    if "train/tokens" in last and "train/epoch" in last:
        rows.insert(1, ("tokens seen", f"{last['train/tokens']:,.0f} ({last['train/epoch']:.3f} epochs)"))
    rates = [line["train/tokens_per_second"] for line in facts.lines if line.get("train/tokens_per_second", 0) > 0]
    if rates:
        seconds = sum(settings["tokens_per_step"] / rate for rate in rates)
        rows.append(("time", f"{format_duration(seconds)} of updates, evaluations not counted"))
    return rows


def _describe_precision(mixed_precision: str) -> str:
    if mixed_precision == "no":
        return "float32"
    return f"{mixed_precision} autocast where the device has it, weights and optimizer in float32"


def _quote_samples(facts: Facts) -> str:
    end = facts.last.get("step", math.inf)
    lines = [line for line in RunFolder(facts.run_folder).read_samples() if line["step"] <= end]
    newest = max((line["step"] for line in lines), default=None)
    return "".join(f"> {quote_text(str(line.get('text')))}\n\n" for line in lines if line["step"] == newest)


def _describe_use(repo_id: str | None) -> str:
    folder = json.dumps(repo_id) if repo_id else '"."  # this folder, or its Hub id'
    return (
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"folder = {folder}\n"
        "model = AutoModelForCausalLM.from_pretrained(folder)\n"
        "tokenizer = AutoTokenizer.from_pretrained(folder)\n"
        'ids = tokenizer("Hello, I\'m a language model,", return_tensors="pt")\n'
        "print(tokenizer.decode(model.generate(**ids, max_new_tokens=32)[0]))\n```\n\n"
        "This opens as transformers' own `GPT2LMHeadModel`; with `trust_remote_code=True` it opens as the class it "
        'was trained with, from the two code files beside the weights. `revision="step-0000250"` opens the model '
        "after so many updates, where the repository has that tag.\n"
    )
