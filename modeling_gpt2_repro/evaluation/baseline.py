"""Baselines: what a model reaches on a folder's validation tokens and on HellaSwag, for curves to be compared with.

They are kept in one file beside the shards. A loss means something on its own tokens only, so each baseline carries
the checksums of the validation shards, how many of their tokens it read and in windows of which length: it is
compared with nothing else.
"""

import json
import math
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from modeling_gpt2_repro.core.errors import UserError, raise_if_refused
from modeling_gpt2_repro.core.files import follow_links, write_json
from modeling_gpt2_repro.evaluation.hellaswag import HellaSwagResult
from modeling_gpt2_repro.evaluation.hellaswag_data import identify_items, name_items
from modeling_gpt2_repro.evaluation.multiple_choice import format_score
from modeling_gpt2_repro.evaluation.validation import ValidationResult

# OpenAI's smallest model by its names on the Hub, which curves are compared with.
GPT2_124M_NAMES = ("openai-community/gpt2", "gpt2")


@dataclass(frozen=True)
class Baseline:
    """A model's numbers; either part is `None` where it was not measured.

    Attributes:
        model: its Hub id, or the absolute path of its folder.
        val_checksums: of the validation shards, in order.
        eval_tokens, sequence_length: as a run's settings say them.
        validation: `val/loss` (nats a token), `val/bpb` (bits a byte), `n_tokens` predicted.
        hellaswag: `items` (what tells them from others), `name`, `limit`, `protocol`, and the scores.

    Both parts also say in which `mixed_precision` they were measured, and at which `date`.
    """

    model: str
    val_checksums: list[str]
    eval_tokens: int
    sequence_length: int
    validation: dict[str, Any] | None = None
    hellaswag: dict[str, Any] | None = None

    @property
    def key(self) -> tuple:
        """What a file holds one baseline of."""
        return self.model, tuple(self.val_checksums), self.eval_tokens, self.sequence_length


def identify_model(name: str) -> str:
    """Return a Hub id as it is, and a folder's absolute path: a folder called `gpt2` is not OpenAI's model."""
    return str(follow_links(name)) if Path(name).is_dir() else name


def record_validation(result: ValidationResult, mixed_precision: str) -> dict[str, Any]:
    """Return a baseline's `validation`. JSON has no NaN: tokens that stand for no bytes leave `val/bpb` at `None`."""
    return {
        "val/loss": result.loss,
        "val/bpb": result.bpb if math.isfinite(result.bpb) else None,
        "n_tokens": result.n_tokens,
        **_stamp(mixed_precision),
    }


def record_hellaswag(
    result: HellaSwagResult, data_file: str | None, limit: int | None, mixed_precision: str
) -> dict[str, Any]:
    """Return a baseline's `hellaswag`, from the first `limit` items of `data_file` (`None`: all, the Hub's)."""
    return {
        "items": identify_items(data_file),
        "name": name_items(data_file, limit),
        "limit": limit,
        "protocol": result.protocol,
        **result.summary(),
        **_stamp(mixed_precision),
    }


def read_baselines(path: Path) -> list[Baseline]:
    """Read all baselines of a file, of whatever tokens; no file means none.

    Raises:
        UserError: the file is damaged.
    """
    try:
        baselines = [Baseline(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))]
        for baseline in baselines:
            for part, name in ((baseline.validation, "val/loss"), (baseline.hellaswag, "acc_norm")):
                # What is drawn has to be a number.
                if part is not None and not (type(part[name]) in (int, float) and math.isfinite(part[name])):
                    raise TypeError(f"{name} is {part[name]!r}")
            if not isinstance(baseline.model, str) or not isinstance(baseline.hellaswag, dict | None):
                raise TypeError("it holds something else than baselines")
            hash(baseline.key)
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise_if_refused(error, path)
        raise UserError(
            f"{path} is damaged ({type(error).__name__}: {error}): remove it, and measure again with train.py "
            "--eval_only"
        ) from error
    return baselines


def load_baselines(path: Path, val_checksums: list[str]) -> list[Baseline]:
    """Read the baselines of a file that belong to the validation shards of these checksums.

    Raises:
        UserError: the file is damaged.
    """
    return [baseline for baseline in read_baselines(path) if baseline.val_checksums == val_checksums]


def save_baseline(path: Path, baseline: Baseline) -> None:
    """Add a baseline to a file, in place of the same model's on the same tokens; a part that it lacks stays.

    Raises:
        UserError: the file is damaged.
        OSError: it cannot be written.
    """
    others = []
    for other in read_baselines(path):
        if other.key == baseline.key:
            baseline = replace(
                baseline,
                validation=baseline.validation or other.validation,
                hellaswag=baseline.hellaswag or other.hellaswag,
            )
        else:
            others.append(other)
    write_json(path, [asdict(entry) for entry in (*others, baseline)])


def format_baseline(baseline: Baseline) -> str:
    """Lay out a model's numbers with their units, one a line."""
    rows = [("model", baseline.model)]
    if validation := baseline.validation:
        windows = f"in windows of {baseline.sequence_length:,}"
        rows.append(("validation", f"{validation['n_tokens']:,} tokens {windows}"))
        rows.append(("  loss", f"{validation['val/loss']:.4f} nats a token"))
        if validation["val/bpb"] is not None:
            rows.append(("  bpb", f"{validation['val/bpb']:.4f} bits a byte"))
    if hellaswag := baseline.hellaswag:
        rows.append(("HellaSwag", f"{hellaswag['n']:,} items: {hellaswag['name']}, protocol {hellaswag['protocol']}"))
        for metric in ("acc_norm", "acc"):
            rows.append((f"  {metric}", format_score(hellaswag[metric], hellaswag[f"{metric}_stderr"])))
        if hellaswag["n_truncated"]:
            rows.append(("  cut", f"{hellaswag['n_truncated']:,} contexts on the left, to fit the model"))
    return "\n".join(f"{name:<12}{value}" for name, value in rows)


def _stamp(mixed_precision: str) -> dict[str, str]:
    return {"mixed_precision": mixed_precision, "date": datetime.now(UTC).isoformat(timespec="seconds")}
