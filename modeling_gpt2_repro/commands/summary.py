"""What a run reached, in a block that fits the terminal."""

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..core.arguments import Config, setting
from ..core.errors import UserError, format_line
from ..core.terminal import get_columns, wrap_text
from ..data.shards import MAX_VOCAB_SIZE, load_manifest
from ..data.unigram import measure_unigram_loss
from ..publishing.scores import ACCURACIES, Score, describe_score, list_scores, read_training_scores
from ..training.building import build_skeleton
from ..training.config import TrainingConfig
from ..training.console import format_duration
from ..training.metrics import Metrics, find_last_validation, format_validation, merge_metrics, read_json_object
from ..training.plan import GPT2_VOCAB_SIZE, count_flops_per_token
from ..training.run_folder import RunFolder

LABEL_COLUMNS = 18
FULL_RUN_TOKENS = 10e9  # configs/gpt2_124M.yaml, rounded
# If the full run would take longer, the summary points to GPUs.
LONG_SECONDS = 30 * 86400

Row = tuple[str, str]  # a label and a text


@dataclass
class SummaryConfig(Config):
    """Settings of the command."""

    folder: str = setting("", "a run folder", path=True, positional=True, metavar="RUN")


def run(config: SummaryConfig) -> None:
    """Print what a run reached."""
    print("\n".join(summarize(RunFolder(config.folder), get_columns())))


def summarize(folder: RunFolder, columns: int) -> list[str]:
    """Return lines of at most `columns` columns, paths aside, on what a run reached and where its files are.

    Raises:
        UserError: the folder has no metrics.
    """
    metrics = folder.read_metrics()
    if not metrics:
        raise UserError(f"{folder} has no {folder.metrics.name}: give the folder of a run that has begun")
    last, indent = merge_metrics(metrics), " " * LABEL_COLUMNS
    lines = [f"{folder}: {last['step']:,} steps, {last.get('train/tokens', 0):,} tokens"]
    rows = [
        *describe_losses(folder, metrics),
        *describe_samples(folder.read_samples(), folder.get_finished_step()),
        *describe_speed(metrics),
        *describe_scores(folder, last),
    ]
    for label, text in rows:
        lines += wrap_text(_start_line(label) + text, columns, indent)
    places = {"model": folder.final, "curves": folder.curves, "numbers": folder.metrics}
    return lines + [_start_line(label) + str(path) for label, path in places.items() if path.exists()]


def _start_line(label: str) -> str:
    return f"  {label}".ljust(LABEL_COLUMNS)


def describe_losses(folder: RunFolder, metrics: Sequence[Metrics]) -> Iterator[Row]:
    """Describe the last validation loss, beside those of a unigram model and of chance."""
    validation = find_last_validation(metrics)
    if validation is None:
        return
    when = "" if validation["step"] == merge_metrics(metrics)["step"] else f", at step {validation['step']:,}"
    yield "validation loss", f"{format_validation(validation)}{when}"
    try:
        config = folder.read_config()
        vocab_size = find_vocab_size(folder, config)
        folder.check_data(config.data_dir)
        n_windows = config.eval_tokens // config.sequence_length
        loss = measure_unigram_loss(config.data_dir, n_windows, config.sequence_length, vocab_size)
        yield "unigram entropy", f"{loss:.4f}, from token frequencies alone"
    except UserError as error:
        vocab_size = find_vocab_size(folder, None)
        yield "unigram entropy", f"not available: {format_line(str(error))}"
    yield "chance", f"{math.log(vocab_size):.4f}, ln {vocab_size:,}"


def find_vocab_size(folder: RunFolder, config: TrainingConfig | None) -> int:
    """Return the vocabulary size of a run's model or, before it is finished, of its data; else GPT-2's.

    Raises:
        UserError: there is no data folder, or its manifest is damaged.
    """
    vocab_size = read_json_object(folder.final / "config.json").get("vocab_size")
    if type(vocab_size) is int and 0 < vocab_size <= MAX_VOCAB_SIZE:
        return vocab_size
    manifest = load_manifest(config.data_dir) if config is not None else None
    return manifest.vocab_size if manifest is not None else GPT2_VOCAB_SIZE


def describe_samples(samples: Sequence[dict[str, Any]], finished_step: int) -> Iterator[Row]:
    """Describe how the model continued one prompt at first and at last."""
    steps = [sample["step"] for sample in samples]
    for step in sorted({min(steps), max(steps)}) if steps else []:
        names = {finished_step: "after training", 0: "before training"}
        yield names.get(step, f"step {step:,}"), format_line(str(samples[steps.index(step)].get("text")))


def describe_speed(metrics: Sequence[Metrics]) -> Iterator[Row]:
    """Describe the median rate of training, and how long the full run would take at the same rate of arithmetic."""
    rates = [line["train/tokens_per_second"] for line in metrics if line.get("train/tokens_per_second", 0) > 0]
    if not rates:
        return
    rate, last = statistics.median(rates), merge_metrics(metrics)
    yield "speed", f"{rate:,.0f} tokens/s (median)"
    full = TrainingConfig()
    full_flops = count_flops_per_token(build_skeleton(full, GPT2_VOCAB_SIZE), full.sequence_length)
    flops = last.get("train/flops", 0) / tokens if (tokens := last.get("train/tokens", 0)) > 0 else 0
    seconds = FULL_RUN_TOKENS * (full_flops / flops if flops > 0 else 1) / rate
    if flops > 0:
        cost = f"{full_flops / 1e6:,.0f} M FLOPs per token with the 124M model, {flops / 1e6:,.0f} M here"
    else:
        cost = "if the 124M model cost no more per token than this one, whose FLOPs the metrics do not record"
    advice = "; it is made for GPUs" if seconds > LONG_SECONDS else ""
    duration = format_duration(seconds)
    yield "full run", f"at this rate of arithmetic, 10 B tokens would take {duration} ({cost}){advice}"


def describe_scores(folder: RunFolder, last: Metrics) -> Iterator[Row]:
    """Describe the HellaSwag scores of the finished model by eval_hellaswag.py or, without any, those in training."""
    scores = list_scores(folder)
    for name in dict.fromkeys(score["data"] for score in scores):
        yield "HellaSwag items", format_line(name)
        for score in (score for score in scores if score["data"] == name):
            yield from _describe_accuracies(score["protocol"], score)
    in_training = read_training_scores(last) if not scores else {}
    if in_training:
        yield "HellaSwag items", "scored in training"
    for protocol, score in in_training.items():
        yield from _describe_accuracies(protocol, score)


def _describe_accuracies(protocol: str, score: Score) -> Iterator[Row]:
    for label, metric in zip((protocol, ""), ACCURACIES, strict=True):
        if metric in score:
            yield label, f"{metric} {describe_score(score, metric)}"
