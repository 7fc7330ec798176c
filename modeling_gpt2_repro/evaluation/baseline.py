"""Baselines: scores measured by `train.py --eval_only`, stored in the data folder for curves to compare with.

Scores measured by others are in `evaluation.published_scores`; `plots.references` selects the comparable ones from
both. Losses are comparable only on the same tokens, so each baseline records the checksums of the validation shards,
the number of tokens evaluated and the window length.
"""

import json
import math
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..core.errors import UserError, raise_if_unreadable
from ..core.files import follow_links, write_json
from .hellaswag import HellaSwagResult
from .hellaswag_data import identify_items, name_items
from .multiple_choice import format_score
from .validation import ValidationResult

# The Hub ids of OpenAI's smallest model, the baseline drawn in curves.
GPT2_124M_NAMES = ("openai-community/gpt2", "gpt2")


@dataclass(frozen=True)
class Baseline:
    """A model's scores. Either part is `None` if it was not measured.

    Attributes:
        model: Hub id, or absolute path of a folder.
        val_checksums: checksums of the validation shards, in order.
        eval_tokens, sequence_length: as in the run's configuration.
        validation: `val/loss` (nats per token), `val/bpb` (bits per byte) and `n_tokens` predicted.
        hellaswag: `items` (their identifier), `name`, `limit`, `protocol` and the scores.

    Both parts also record `mixed_precision` and the `date` of the measurement.
    """

    model: str
    val_checksums: list[str]
    eval_tokens: int
    sequence_length: int
    validation: dict[str, Any] | None = None
    hellaswag: dict[str, Any] | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        """The identity of a baseline, unique within a file."""
        return self.model, tuple(self.val_checksums), self.eval_tokens, self.sequence_length


def identify_model(name: str) -> str:
    """Return the absolute path of a folder, and a Hub id unchanged: a folder called `gpt2` is not OpenAI's model."""
    return str(follow_links(name)) if Path(name).is_dir() else name


def record_validation(result: ValidationResult, mixed_precision: str) -> dict[str, Any]:
    """Return a baseline's `validation`; `val/bpb` is `None` if the tokens have no bytes, because JSON has no NaN."""
    return {
        "val/loss": result.loss,
        "val/bpb": result.bpb if math.isfinite(result.bpb) else None,
        "n_tokens": result.n_tokens,
        **_stamp(mixed_precision),
    }


def record_hellaswag(
    result: HellaSwagResult, data_file: str | None, limit: int | None, mixed_precision: str
) -> dict[str, Any]:
    """Return a baseline's `hellaswag` for the first `limit` items (`None`: all) of `data_file` (`None`: the Hub)."""
    return {
        "items": identify_items(data_file),
        "name": name_items(data_file, limit),
        "limit": limit,
        "protocol": result.protocol,
        **result.summary(),
        **_stamp(mixed_precision),
    }


def read_baselines(path: Path) -> list[Baseline]:
    """Read all baselines in a file, or return an empty list if there is no file.

    Raises:
        UserError: the file is damaged.
    """
    try:
        return [_parse_baseline(entry) for entry in json.loads(path.read_text(encoding="utf-8"))]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise_if_unreadable(error, path)
        raise UserError(
            f"{path} is damaged ({type(error).__name__}: {error}): delete it and measure again with train.py "
            "--eval_only"
        ) from error


def _parse_baseline(entry: dict[str, Any]) -> Baseline:
    """Build a baseline and check the values that curves use. Raises the errors that `read_baselines` handles."""
    baseline = Baseline(**entry)
    for part, name in ((baseline.validation, "val/loss"), (baseline.hellaswag, "acc_norm")):
        if part is not None and not (type(part[name]) in (int, float) and math.isfinite(part[name])):
            raise TypeError(f"{name} is {part[name]!r}")
    hash(baseline.key)
    return baseline


def load_baselines(path: Path, val_checksums: list[str]) -> list[Baseline]:
    """Read the baselines in a file that were measured on validation shards with these checksums.

    Raises:
        UserError: the file is damaged.
    """
    return [baseline for baseline in read_baselines(path) if baseline.val_checksums == val_checksums]


def save_baseline(path: Path, baseline: Baseline) -> None:
    """Add a baseline to a file, or update the one with the same key: parts that were not measured keep their values.

    Raises:
        UserError: the file is damaged.
        OSError: the file cannot be written.
    """
    others = {other.key: other for other in read_baselines(path)}
    older = others.pop(baseline.key, baseline)
    validation, hellaswag = baseline.validation or older.validation, baseline.hellaswag or older.hellaswag
    baseline = replace(baseline, validation=validation, hellaswag=hellaswag)
    write_json(path, [asdict(entry) for entry in (*others.values(), baseline)])


def format_baseline(baseline: Baseline) -> str:
    """Format a model's scores with their units, one per line."""
    lines = [f"model       {baseline.model}"]
    if val := baseline.validation:
        lines.append(f"validation  {val['n_tokens']:,} tokens in windows of {baseline.sequence_length:,}")
        lines.append(f"  loss      {val['val/loss']:.4f} nats per token")
        if val["val/bpb"] is not None:
            lines.append(f"  bpb       {val['val/bpb']:.4f} bits per byte")
    if score := baseline.hellaswag:
        lines.append(f"HellaSwag   {score['name']}, protocol {score['protocol']}")
        lines.append(f"  acc_norm  {format_score(score['acc_norm'], score['acc_norm_stderr'], score['n'])}")
        lines.append(f"  acc       {format_score(score['acc'], score['acc_stderr'], score['n'])}")
        if score["n_truncated"]:
            lines.append(f"  truncated {score['n_truncated']:,} contexts on the left, to fit the model")
    return "\n".join(lines)


def _stamp(mixed_precision: str) -> dict[str, str]:
    return {"mixed_precision": mixed_precision, "date": datetime.now(UTC).isoformat(timespec="seconds")}
