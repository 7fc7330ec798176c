"""HellaSwag: which of four endings continues a context? The one implementation behind training and evaluation.

HellaSwag (Zellers et al., 2019, https://arxiv.org/abs/1905.07830) has no single score: two protocols are in use, which
differ by up to two points on the same model, so every result carries the name of its protocol.

- `original`: the protocol of the original GPT-2 reproduction script (karpathy/build-nanogpt, `hellaswag.py`). The raw
  `ctx` and each ending after one space are encoded apart; `acc_norm` divides by the number of *tokens*.
- `lm_eval`: the `hellaswag` task of EleutherAI's lm-evaluation-harness 0.4. The activity label is prepended, the
  markup of the WikiHow half removed, and context and ending are encoded together; `acc_norm` divides by the number of
  *characters*.

Both pick the ending with the highest summed log-probability (`acc`) and the highest per unit of length (`acc_norm`).

The text `<|endoftext|>` in an item is encoded as ordinary text in both protocols. No item of HellaSwag contains it.
"""

import itertools
import math
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from modeling_gpt2_repro.core.devices import compute_once
from modeling_gpt2_repro.core.errors import UserError
from modeling_gpt2_repro.evaluation.hellaswag_data import HellaSwagItem
from modeling_gpt2_repro.evaluation.multiple_choice import compute_accuracies, pick_endings
from modeling_gpt2_repro.evaluation.scoring import can_share_context, choose_batch_tokens, evaluation_mode, score_items
from modeling_gpt2_repro.evaluation.shared_context import EncodedChoices, build_rows, is_truncated, plan_batches
from modeling_gpt2_repro.model.limits import get_max_positions

# The prefix of a run's metrics, by protocol.
METRIC_PREFIXES = {"original": "hellaswag", "lm_eval": "hellaswag_lm_eval"}
SCORE_NAMES = ("acc_norm", "acc", "acc_norm_stderr", "acc_stderr", "n")
ITEMS_PER_ENCODING = 1000


@dataclass(frozen=True)
class EncodedItem(EncodedChoices):
    """One item under a protocol; `acc_norm` divides by `ending_lengths`, in tokens (`original`) or characters."""

    ind: int
    label: int
    ending_lengths: tuple[int, ...]


@dataclass(frozen=True)
class EncodedHellaSwag:
    """Items under a protocol: encode once, evaluate many checkpoints."""

    protocol: str
    items: tuple[EncodedItem, ...]

    @property
    def n_tokens(self) -> int:
        """Tokens that a model reads if each context is read once for all of its endings."""
        return sum(item.n_read for item in self.items)

    @property
    def largest_id(self) -> int:
        """The largest token id in any item."""
        return max(max(*item.context_ids, *itertools.chain(*item.ending_ids)) for item in self.items)

    def count_truncated(self, max_positions: int | None) -> int:
        """Return how many contexts lose tokens on the left to fit a model.

        Raises:
            UserError: an ending does not fit even without its context.
        """
        return sum(is_truncated(item, max_positions) for item in self.items)


@dataclass(frozen=True)
class ScoredItem:
    """A model's answer: `nll` is each ending's summed negative log-probability in nats."""

    ind: int
    label: int
    nll: tuple[float, ...]
    predicted: int
    predicted_norm: int


@dataclass(frozen=True)
class HellaSwagResult:
    """Accuracies under one protocol, as fractions of `n` items, with their standard errors (`None` if n is 1).

    `n_truncated` counts the items whose context lost tokens on the left to fit the model.
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
        """Return the numbers of `results.json`: everything but the items."""
        return {name: value for name, value in vars(self).items() if name not in ("protocol", "scored_items")}

    def metrics(self) -> dict[str, float]:
        """Return the accuracies, their standard errors and `n` under the names of a run's metrics."""
        values = {name: getattr(self, name) for name in SCORE_NAMES}
        prefix = METRIC_PREFIXES[self.protocol]
        return {f"{prefix}/{name}": value for name, value in values.items() if value is not None}

    def per_example(self) -> list[dict[str, Any]]:
        """Return one JSON-serializable object per item."""
        return [{"protocol": self.protocol, **asdict(item)} for item in self.scored_items]


def render_original(item: HellaSwagItem) -> tuple[str, list[str]]:
    """Return the text of the context and of its continuations under the `original` protocol."""
    return item.ctx, [" " + ending for ending in item.endings]


def render_lm_eval(item: HellaSwagItem) -> tuple[str, list[str]]:
    """Return the text of the context and of its continuations under the `lm_eval` protocol.

    As in the harness, spaces at the end of the context move to the front of every continuation, so that the two meet
    at a word boundary.
    """
    prompt = clean_marks(f"{item.activity_label}: {item.ctx_a} {item.ctx_b.capitalize()}")
    context = prompt.rstrip()
    blanks = prompt[len(context) :]
    return context, [f"{blanks} {clean_marks(ending)}" for ending in item.endings]


def clean_marks(text: str) -> str:
    """Remove the `[header]`, `[title]`, `[step]` marks of the WikiHow half as the harness does.

    The order of the steps and the single pass over double spaces are part of the protocol: a text that begins with a
    mark keeps a leading space, and three spaces become two.
    """
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def encode_original(items: Sequence[HellaSwagItem], tokenizer) -> list[EncodedItem]:
    """Encode contexts and endings apart, without special tokens."""
    texts = [[context, *continuations] for context, continuations in map(render_original, items)]
    ids_by_item = _encode(tokenizer, texts, add_special_tokens=False)
    return [
        _build_encoded_item(item, context_ids, ending_ids, list(map(len, ending_ids)))
        for item, (context_ids, *ending_ids) in zip(items, ids_by_item, strict=True)
    ]


def encode_lm_eval(items: Sequence[HellaSwagItem], tokenizer) -> list[EncodedItem]:
    """Encode contexts and whole texts; an ending is what follows the context's number of tokens.

    As in the harness, a tokenizer that begins a text with a special token (GPT-2's does not) does so here.
    """
    texts = [
        [context, *(context + continuation for continuation in continuations)]
        for context, continuations in map(render_lm_eval, items)
    ]
    ids_by_item = _encode(tokenizer, texts, add_special_tokens=True)
    encoded = []
    for item, (context_ids, *whole_ids) in zip(items, ids_by_item, strict=True):
        ending_ids = [ids[len(context_ids) :] for ids in whole_ids]
        lengths = [len(clean_marks(ending)) for ending in item.endings]
        encoded.append(_build_encoded_item(item, context_ids, ending_ids, lengths))
    return encoded


ENCODERS: dict[str, Callable[[Sequence[HellaSwagItem], Any], list[EncodedItem]]] = {
    "original": encode_original,
    "lm_eval": encode_lm_eval,
}


def encode_hellaswag(items: Sequence[HellaSwagItem], tokenizer, protocol: str) -> EncodedHellaSwag:
    """Encode items under the protocol `original` or `lm_eval` with a transformers tokenizer.

    Raises:
        UserError: a context or an ending encodes to no tokens.
    """
    return EncodedHellaSwag(protocol, tuple(ENCODERS[protocol](items, tokenizer)))


class HellaSwagQuestions:
    """Items whose encoding under a protocol is computed at its first use, once for all processes.

    All processes call `encode` and `check_fits` together.
    """

    def __init__(self, items: Sequence[HellaSwagItem], tokenizer, accelerator):
        self.items, self.tokenizer, self.accelerator = items, tokenizer, accelerator
        self._encoded: dict[str, EncodedHellaSwag] = {}

    def encode(self, protocol: str) -> EncodedHellaSwag:
        """Return the items under the protocol `original` or `lm_eval`, as `encode_hellaswag` does."""
        if protocol not in self._encoded:
            encode = partial(encode_hellaswag, self.items, self.tokenizer, protocol)
            self._encoded[protocol] = compute_once(encode, self.accelerator)
        return self._encoded[protocol]

    def check_fits(self, max_positions: int | None) -> None:
        """Raise a `UserError` if an ending is too long for a model, under any protocol.

        Protocols render an ending almost alike, so only endings that are long under one are encoded under the other.
        """
        original = self.encode("original")
        original.count_truncated(max_positions)
        if max_positions is not None:
            long = [
                item
                for item, encoded in zip(self.items, original.items, strict=True)
                if 2 * max(map(len, encoded.ending_ids)) > max_positions
            ]
            if long:
                encode_hellaswag(long, self.tokenizer, "lm_eval").count_truncated(max_positions)


def _encode(tokenizer, texts_by_item: list[list[str]], add_special_tokens: bool) -> Iterator[list[list[int]]]:
    """Yield the ids of each item's texts. Many texts in a call are several times as fast as a few."""
    options = {"split_special_tokens": True, "return_attention_mask": False}
    for start in range(0, len(texts_by_item), ITEMS_PER_ENCODING):
        chunk = texts_by_item[start : start + ITEMS_PER_ENCODING]
        encoded = tokenizer(list(itertools.chain(*chunk)), add_special_tokens=add_special_tokens, **options)
        ids = iter(encoded["input_ids"])
        for texts in chunk:
            yield list(itertools.islice(ids, len(texts)))


def _build_encoded_item(
    item: HellaSwagItem, context_ids: list[int], ending_ids: list[list[int]], ending_lengths: list[int]
) -> EncodedItem:
    if not context_ids or not all(ending_ids):
        raise UserError(
            f"the tokenizer makes no token of the context or of an ending of item {item.ind}: put the tokenizer that "
            "the model was trained with beside it"
        )
    return EncodedItem(context_ids, ending_ids, ind=item.ind, label=item.label, ending_lengths=tuple(ending_lengths))


def reduce_nll(encoded: EncodedHellaSwag, nll: Sequence[Sequence[float]], **facts: Any) -> HellaSwagResult:
    """Reduce each ending's summed negative log-probability, in nats, to accuracies. `nll[i]` belongs to item i."""
    scored_items = tuple(score_item(item, sums) for item, sums in zip(encoded.items, nll, strict=True))
    accuracies = compute_accuracies(
        [(item.predicted, item.predicted_norm) for item in scored_items], [item.label for item in scored_items]
    )
    return HellaSwagResult(
        protocol=encoded.protocol, n=len(scored_items), **accuracies, scored_items=scored_items, **facts
    )


def score_item(item: EncodedItem, nll: Sequence[float]) -> ScoredItem:
    """Return a model's sums and the endings that they pick, beside the label."""
    predicted, predicted_norm = pick_endings(nll, item.ending_lengths)
    return ScoredItem(item.ind, item.label, tuple(nll), predicted, predicted_norm)


def evaluate_hellaswag(
    model: torch.nn.Module,
    encoded: EncodedHellaSwag,
    *,
    batch_tokens: int | None = None,
    accelerator: Accelerator | PartialState | None = None,
    show_progress: bool = True,
) -> HellaSwagResult:
    """Score a causal language model on encoded items.

    Every number is the same on any number of processes, because batches are planned over all items before they are
    divided. The model's training mode is restored, and no random number is drawn.

    Args:
        model: the bare module (neither wrapped nor compiled), on the device to compute on. Precision is the caller's:
            its parameters' type, or an autocast around this call. Log-softmax is in float32 and sums in float64
            either way.
        batch_tokens: the most tokens, padding included, in one forward pass; `None` lets free memory decide.
        accelerator: divides the items among its processes, which all have to call this with the same items; `None`
            means this process alone.

    Raises:
        UserError: an ending is longer than the model's positions, or a log-probability is not finite.
    """
    rank, n_processes = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    started, max_positions = time.perf_counter(), get_max_positions(model)
    n_truncated = encoded.count_truncated(max_positions)
    with evaluation_mode(model):
        choose = partial(choose_reading, model, encoded, batch_tokens)
        shares_context, batch_tokens = compute_once(choose, accelerator) if accelerator else choose()
        if not shares_context and rank == 0:
            warn_of_plain_rows(type(model).__name__)
        rows = [build_rows(item, max_positions, shares_context) for item in encoded.items]
        own_batches = plan_batches(rows, batch_tokens)[rank::n_processes]
        nll = score_batches(model, encoded, rows, own_batches, shares_context, show_progress and rank == 0)
    if n_processes > 1:
        gathered = gather_object(list(nll.items()))
        nll = dict(gathered)
        assert len(nll) == len(gathered), "no item is scored twice"
    assert nll.keys() == set(range(len(encoded.items))), "every item is scored"
    check_finite(encoded, nll)
    return reduce_nll(
        encoded,
        [nll[index] for index in range(len(nll))],
        n_truncated=n_truncated,
        examples_per_second=len(nll) / (time.perf_counter() - started),
    )


def choose_reading(model: torch.nn.Module, encoded: EncodedHellaSwag, batch_tokens: int | None) -> tuple[bool, int]:
    """Return whether the model can share contexts, which a probe shows, and the most tokens in a batch."""
    shares_context = can_share_context(model, encoded.items, get_max_positions(model))
    return shares_context, batch_tokens or choose_batch_tokens(model)


def score_batches(
    model: torch.nn.Module,
    encoded: EncodedHellaSwag,
    rows: Sequence[Sequence[EncodedChoices]],
    batches: Sequence[Sequence[int]],
    selects_places: bool,
    show_progress: bool,
) -> dict[int, list[float]]:
    """Return the sums of each item's endings by the item's index; a batch is the indices of its items."""
    nll: dict[int, list[float]] = {}
    n_correct = 0
    n_items, title = sum(map(len, batches)), f"HellaSwag {encoded.protocol}"
    with tqdm(total=n_items, desc=title, unit="item", disable=not show_progress) as bar:
        for batch in batches:
            batch_nll = score_items(model, [rows[index] for index in batch], selects_places)
            for index, sums in zip(batch, batch_nll, strict=True):
                nll[index] = sums
                n_correct += score_item(encoded.items[index], sums).predicted_norm == encoded.items[index].label
            bar.set_postfix_str(f"acc_norm {n_correct / len(nll):.4f}", refresh=False)
            bar.update(len(batch))
    return nll


@cache
def warn_of_plain_rows(model_class: str) -> None:
    """Warn, once for a class of models, that its contexts are not shared."""
    print(
        f"{model_class} does not honour a 4-D attention mask with positions that restart, or has an attention window "
        "that is shorter than an item: each ending is read with a context of its own, which is slower",
        file=sys.stderr,
        flush=True,
    )


def check_finite(encoded: EncodedHellaSwag, nll: Mapping[int, Sequence[float]]) -> None:
    """Raise a `UserError` for log-probabilities that are not finite, which would compare as a score near chance."""
    for index, sums in sorted(nll.items()):
        if not all(map(math.isfinite, sums)):
            raise UserError(
                f"the model gives item {encoded.items[index].ind} a log-probability that is not finite: "
                "its weights are broken, or its precision is too low (try float32)"
            )
