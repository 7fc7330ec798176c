"""Multiple choice: from log-probabilities of competing endings to accuracies, as pure arithmetic."""

import math
from collections.abc import Sequence


def pick_endings(nll: Sequence[float], lengths: Sequence[int]) -> tuple[int, int]:
    """Return the index of the most probable ending by sum and by mean over length; the first one wins a tie.

    Args:
        nll: each ending's summed negative log-probability.
        lengths: the divisor of each sum. An ending of length 0, which was nothing but a mark, is never picked.
    """
    means = [total / length if length else math.inf for total, length in zip(nll, lengths, strict=True)]
    return min(range(len(nll)), key=nll.__getitem__), min(range(len(nll)), key=means.__getitem__)


def compute_accuracies(picked: Sequence[tuple[int, int]], labels: Sequence[int]) -> dict[str, float | None]:
    """Reduce the answers to `acc` and `acc_norm`, as fractions, and their sample standard errors `*_stderr`.

    A standard error is `None` for a single question.

    Args:
        picked: for each question, the endings picked by sum and by mean, as from `pick_endings`.
        labels: the right ending of each question.
    """
    result: dict[str, float | None] = {}
    for name, picks in zip(("acc", "acc_norm"), zip(*picked, strict=True), strict=True):
        hits = [pick == label for pick, label in zip(picks, labels, strict=True)]
        n, mean = len(hits), sum(hits) / len(hits)
        result[name] = mean
        # In lm-evaluation-harness's order of operations, for standard errors that are equal to the last bit.
        stderr = math.sqrt(sum((hit - mean) ** 2 for hit in hits) / (n - 1)) / math.sqrt(n) if n > 1 else None
        result[f"{name}_stderr"] = stderr
    return result


def format_score(score: float, stderr: float | None = None) -> str:
    """Return an accuracy, with its standard error if there is one, as in `0.2955 +- 0.0046`."""
    return f"{score:.4f}" if stderr is None else f"{score:.4f} +- {stderr:.4f}"
