"""Baselines: scores that `train.py --eval_only` measured here, kept beside the data for curves to compare with.

Those of `evaluation.published_scores` were measured by others; `plots.references` chooses from both what a run may be
compared with. A loss is comparable on the same tokens only, so each baseline carries the checksums of the validation
shards, the number of tokens evaluated and the window length.
"""

import json
import math
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..core.errors import UserError, raise_if_refused
from ..core.files import follow_links, write_json
from .hellaswag import HellaSwagResult
from .hellaswag_data import identify_items, name_items
from .multiple_choice import format_score
from .validation import ValidationResult

# The Hub ids of OpenAI's smallest model, which curves are compared with.
GPT2_124M_NAMES = ("openai-community/gpt2", "gpt2")


@dataclass(frozen=True)
class Baseline:
    """A model's scores; either part is `None` if it was not measured.

    Attributes:
        model: Hub id, or the absolute path of a folder.
        val_checksums: of the validation shards, in order.
        eval_tokens, sequence_length: as in a run's configuration.
        validation: `val/loss` (nats per token), `val/bpb` (bits per byte), `n_tokens` predicted.
        hellaswag: `items` (their identifier), `name`, `limit`, `protocol`, and the scores.

    Both parts also have `mixed_precision` and the `date` of the measurement.
    """

    model: str
    val_checksums: list[str]
    eval_tokens: int
    sequence_length: int
    validation: dict[str, Any] | None = None
    hellaswag: dict[str, Any] | None = None

    @property
    def key(self) -> tuple:
        """The identity of a baseline: a file holds one for each."""
        return self.model, tuple(self.val_checksums), self.eval_tokens, self.sequence_length


def identify_model(name: str) -> str:
    """Return a Hub id unchanged, and a folder's absolute path: a folder called `gpt2` is not OpenAI's model."""
    return str(follow_links(name)) if Path(name).is_dir() else name


def record_validation(result: ValidationResult, mixed_precision: str) -> dict[str, Any]:
    """Return a baseline's `validation`. Tokens that stand for no bytes give `val/bpb` `None`, as JSON has no NaN."""
    return {
        "val/loss": result.loss,
        "val/bpb": result.bpb if math.isfinite(result.bpb) else None,
        "n_tokens": result.n_tokens,
        **_stamp(mixed_precision),
    }


def record_hellaswag(
    result: HellaSwagResult, data_file: str | None, limit: int | None, mixed_precision: str
) -> dict[str, Any]:
    """Return a baseline's `hellaswag` for the first `limit` items (`None`: all) of `data_file` (`None`: the Hub's)."""
    return {
        "items": identify_items(data_file),
        "name": name_items(data_file, limit),
        "limit": limit,
        "protocol": result.protocol,
        **result.summary(),
        **_stamp(mixed_precision),
    }


def read_baselines(path: Path) -> list[Baseline]:
    """Read all baselines of a file, or none if there is no file.

    Raises:
        UserError: the file is damaged.
    """
    try:
        return [_parse_baseline(entry) for entry in json.loads(path.read_text(encoding="utf-8"))]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise_if_refused(error, path)
        raise UserError(
            f"{path} is damaged ({type(error).__name__}: {error}): remove it, and measure again with train.py "
            "--eval_only"
        ) from error


def _parse_baseline(entry: dict[str, Any]) -> Baseline:
    """Check what curves are drawn from. Raises any of the errors that `read_baselines` explains."""
    baseline = Baseline(**entry)
    for part, name in ((baseline.validation, "val/loss"), (baseline.hellaswag, "acc_norm")):
        if part is not None and not (type(part[name]) in (int, float) and math.isfinite(part[name])):
            raise TypeError(f"{name} is {part[name]!r}")
    hash(baseline.key)
    return baseline


def load_baselines(path: Path, val_checksums: list[str]) -> list[Baseline]:
    """Read the baselines of a file that were measured on the validation shards with these checksums.

    Raises:
        UserError: the file is damaged.
    """
    return [baseline for baseline in read_baselines(path) if baseline.val_checksums == val_checksums]


def save_baseline(path: Path, baseline: Baseline) -> None:
    """Add a baseline to a file. It replaces the same model's on the same tokens, except for a part that it lacks.

    Raises:
        UserError: the file is damaged.
        OSError: it cannot be written.
    """
    others = {other.key: other for other in read_baselines(path)}
    older = others.pop(baseline.key, baseline)
    validation, hellaswag = baseline.validation or older.validation, baseline.hellaswag or older.hellaswag
    baseline = replace(baseline, validation=validation, hellaswag=hellaswag)
    write_json(path, [asdict(entry) for entry in (*others.values(), baseline)])


def format_baseline(baseline: Baseline) -> str:
    """Return a model's scores with their units, one per line."""
    lines = [f"model       {baseline.model}"]
    if val := baseline.validation:
        lines.append(f"validation  {val['n_tokens']:,} tokens in windows of {baseline.sequence_length:,}")
        lines.append(f"  loss      {val['val/loss']:.4f} nats a token")
        if val["val/bpb"] is not None:
            lines.append(f"  bpb       {val['val/bpb']:.4f} bits a byte")
    if score := baseline.hellaswag:
        lines.append(f"HellaSwag   {score['n']:,} items: {score['name']}, protocol {score['protocol']}")
        lines.append(f"  acc_norm  {format_score(score['acc_norm'], score['acc_norm_stderr'])}")
        lines.append(f"  acc       {format_score(score['acc'], score['acc_stderr'])}")
        if score["n_truncated"]:
            lines.append(f"  cut       {score['n_truncated']:,} contexts on the left, to fit the model")
    return "\n".join(lines)


def _stamp(mixed_precision: str) -> dict[str, str]:
    return {"mixed_precision": mixed_precision, "date": datetime.now(UTC).isoformat(timespec="seconds")}
