"""HellaSwag: which of four endings continues a context? Training and `eval_hellaswag.py` share this implementation.

Every result records its protocol (see `hellaswag_protocols`).
"""

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..core.devices import compute_once
from ..core.errors import UserError
from ..model.limits import get_max_positions
from .hellaswag_protocols import EncodedHellaSwag, EncodedItem
from .multiple_choice import compute_accuracies, format_score, pick_endings
from .scoring import can_share_context, choose_batch_tokens, evaluation_mode, score_items
from .shared_context import EncodedChoices, build_rows, plan_batches

# Prefix of a run's metrics, by protocol.
METRIC_PREFIXES = {"original": "hellaswag", "lm_eval": "hellaswag_lm_eval"}
# Where stderr is not a terminal, a short evaluation shows no progress, and a long one little.
SECONDS_BETWEEN_REPORTS = 15
SCORE_NAMES = ("acc_norm", "acc", "acc_norm_stderr", "acc_stderr", "n")


@dataclass(frozen=True)
class ScoredItem:
    """A model's answer to an item. `nll` is the summed negative log-probability of each ending, in nats."""

    ind: int
    label: int
    nll: tuple[float, ...]
    predicted: int
    predicted_norm: int


@dataclass(frozen=True)
class HellaSwagResult:
    """Accuracies under one protocol, as fractions of `n` items, with their standard errors (`None` if n is 1).

    `n_truncated` counts the items whose context was truncated on the left to fit the model.
    """

    protocol: str
    n: int
    acc: float
    acc_stderr: float | None
    acc_norm: float
    acc_norm_stderr: float | None
    scored_items: tuple[ScoredItem, ...]
    n_truncated: int = 0
    examples_per_second: float = math.nan

    def summary(self) -> dict[str, Any]:
        """Return the fields written to `results.json`: all but the protocol and the items."""
        return {name: value for name, value in vars(self).items() if name not in ("protocol", "scored_items")}

    def metrics(self) -> dict[str, float]:
        """Return the accuracies, their standard errors and `n`, keyed by a run's metric names."""
        values = {name: getattr(self, name) for name in SCORE_NAMES}
        prefix = METRIC_PREFIXES[self.protocol]
        return {f"{prefix}/{name}": value for name, value in values.items() if value is not None}

    def describe(self) -> list[str]:
        """Return a line per accuracy, with its standard error beside chance, under its metric name in a run."""
        prefix, values = METRIC_PREFIXES[self.protocol], vars(self)
        return [
            f"{prefix}/{name} {format_score(values[name], values[f'{name}_stderr'], self.n)}"
            for name in ("acc_norm", "acc")
        ]

    def per_example(self) -> list[dict[str, Any]]:
        """Return one JSON-serializable object per item."""
        return [{"protocol": self.protocol, **asdict(item)} for item in self.scored_items]


def reduce_nll(encoded: EncodedHellaSwag, nll: Sequence[Sequence[float]], **facts: Any) -> HellaSwagResult:
    """Reduce the summed negative log-probabilities of the endings, in nats, to accuracies. `nll[i]` is of item i.

    Raises:
        UserError: a log-probability is not finite; comparing it would give an accuracy near chance.
    """
    for item, sums in zip(encoded.items, nll, strict=True):
        if not all(map(math.isfinite, sums)):
            raise UserError(
                f"non-finite log-probability for item {item.ind}: the model's weights are broken, or its precision is "
                "too low (try float32)"
            )
    scored = tuple(map(score_item, encoded.items, nll))
    picked = [(item.predicted, item.predicted_norm) for item in scored]
    accuracies: dict[str, Any] = compute_accuracies(picked, [item.label for item in scored])
    return HellaSwagResult(encoded.protocol, n=len(scored), **accuracies, scored_items=scored, **facts)


def score_item(item: EncodedItem, nll: Sequence[float]) -> ScoredItem:
    """Return the endings that a model's sums pick for an item, together with its label."""
    predicted, predicted_norm = pick_endings(nll, item.ending_lengths)
    return ScoredItem(item.ind, item.label, tuple(nll), predicted, predicted_norm)


def evaluate_hellaswag(
    model: PreTrainedModel,
    encoded: EncodedHellaSwag,
    *,
    batch_tokens: int | None = None,
    accelerator: Accelerator | PartialState | None = None,
    show_progress: bool = True,
) -> HellaSwagResult:
    """Score a causal language model on encoded items.

    The numbers do not depend on the number of processes, because batches are planned over all items before they are
    distributed. The model's training mode is restored, and no random numbers are drawn.

    Args:
        model: the bare module (neither wrapped nor compiled), already on its device. The caller chooses the precision:
            the dtype of the parameters, or an autocast context around this call. Log-softmax is always in float32 and
            sums in float64.
        batch_tokens: maximum tokens per forward pass, including padding; `None` chooses by free memory.
        accelerator: distributes the items among its processes, which must all call this with the same items; `None`
            means this process only.

    Raises:
        UserError: an ending is longer than the model's positions, or a log-probability is not finite.
    """
    rank, n_processes = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    started, max_positions = time.perf_counter(), get_max_positions(model)
    n_truncated = encoded.count_truncated(max_positions)

    def choose_batching() -> tuple[bool, int]:
        return can_share_context(model, encoded.items, max_positions), batch_tokens or choose_batch_tokens(model)

    with evaluation_mode(model):
        shares_context, budget = compute_once(choose_batching, accelerator) if accelerator else choose_batching()
        if not shares_context and rank == 0:
            warn_of_unshared_contexts(type(model).__name__)
        rows = [build_rows(item, max_positions, shares_context) for item in encoded.items]
        own_batches = plan_batches(rows, budget)[rank::n_processes]
        nll = score_batches(model, encoded, rows, own_batches, shares_context, show_progress and rank == 0)
    if n_processes > 1:
        nll = dict(gather_object(list(nll.items())))
    assert nll.keys() == set(range(len(encoded.items))), "every item must be scored exactly once"
    speed = len(nll) / (time.perf_counter() - started)
    ordered = [nll[index] for index in range(len(nll))]
    return reduce_nll(encoded, ordered, n_truncated=n_truncated, examples_per_second=speed)


def score_batches(
    model: PreTrainedModel,
    encoded: EncodedHellaSwag,
    rows: Sequence[Sequence[EncodedChoices]],
    batches: Sequence[Sequence[int]],
    selects_places: bool,
    show_progress: bool,
) -> dict[int, list[float]]:
    """Return the summed negative log-probabilities of the endings by item index; a batch is a list of item indices."""
    nll: dict[int, list[float]] = {}
    n_correct, n_items = 0, sum(map(len, batches))
    is_log = not sys.stderr.isatty()
    options: dict[str, Any] = (
        {"delay": SECONDS_BETWEEN_REPORTS, "mininterval": SECONDS_BETWEEN_REPORTS} if is_log else {}
    )
    options |= {"desc": f"HellaSwag {encoded.protocol}", "unit": "item", "leave": False, "dynamic_ncols": True}
    with tqdm(total=n_items, disable=not show_progress, **options) as bar:
        for batch in batches:
            batch_nll = score_items(model, [rows[index] for index in batch], selects_places)
            for index, sums in zip(batch, batch_nll, strict=True):
                nll[index] = sums
                n_correct += score_item(encoded.items[index], sums).predicted_norm == encoded.items[index].label
            bar.set_postfix_str(f"acc_norm {n_correct / len(nll):.4f}", refresh=False)
            bar.update(len(batch))
    return nll


@cache
def warn_of_unshared_contexts(model_class: str) -> None:
    """Warn, once per model class, that contexts cannot be shared among endings."""
    print(
        f"{model_class} does not support a 4-D attention mask with restarting positions, or its attention window is "
        "shorter than an item: the context is recomputed for each ending, which is slower",
        file=sys.stderr,
        flush=True,
    )
