"""Multiple-choice arithmetic: from log-probabilities of competing endings to accuracies."""

import math
from collections.abc import Sequence

CHANCE = 0.25  # accuracy of guessing one of four endings


def pick_endings(nll: Sequence[float], lengths: Sequence[int]) -> tuple[int, int]:
    """Return the indices of the most probable ending by sum and by mean over length. Ties go to the first.

    Args:
        nll: summed negative log-probability of each ending.
        lengths: divisor of each sum. An ending of length 0 (one that was only a mark) is never picked by mean.
    """
    means = [total / length if length else math.inf for total, length in zip(nll, lengths, strict=True)]
    return min(range(len(nll)), key=nll.__getitem__), min(range(len(nll)), key=means.__getitem__)


def compute_accuracies(picked: Sequence[tuple[int, int]], labels: Sequence[int]) -> dict[str, float | None]:
    """Return `acc` and `acc_norm`, as fractions, and their sample standard errors `*_stderr`.

    For a single question, the standard errors are `None`.

    Args:
        picked: for each question, the endings picked by sum and by mean (see `pick_endings`).
        labels: the correct ending of each question.
    """
    result: dict[str, float | None] = {}
    for name, picks in zip(("acc", "acc_norm"), zip(*picked, strict=True), strict=True):
        hits = [pick == label for pick, label in zip(picks, labels, strict=True)]
        n, mean = len(hits), sum(hits) / len(hits)
        result[name] = mean
        # The order of operations of lm-evaluation-harness, so that standard errors match to the last bit.
        stderr = math.sqrt(sum((hit - mean) ** 2 for hit in hits) / (n - 1)) / math.sqrt(n) if n > 1 else None
        result[f"{name}_stderr"] = stderr
    return result


def format_score(score: float, stderr: float | None = None, n: int | None = None) -> str:
    """Format an accuracy with its standard error beside chance, e.g. `0.2708 ± 0.0642 (chance 0.25, 48 items)`.

    Args:
        stderr: standard error; `None` if unknown.
        n: number of items; `None` if unknown.
    """
    error = "" if stderr is None else f" ± {stderr:.4f}"
    items = "" if n is None else f", {n:,} items"
    return f"{score:.4f}{error} (chance {CHANCE}{items})"
