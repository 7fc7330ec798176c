"""The two HellaSwag protocols: how items are tokenized, and how their scores are normalized.

HellaSwag (Zellers et al., 2019, https://arxiv.org/abs/1905.07830) has no single score. Two protocols are in use, and
they differ by up to two points on the same model, so every result records its protocol.

- `original`: the protocol of the original GPT-2 reproduction script (karpathy/build-nanogpt, `hellaswag.py`). The raw
  `ctx` and each ending, preceded by a space, are encoded separately; `acc_norm` divides by the number of *tokens*.
- `lm_eval`: the `hellaswag` task of EleutherAI's lm-evaluation-harness 0.4. The activity label is prepended, the
  markup of the WikiHow half removed, and context and ending are encoded together; `acc_norm` divides by the number of
  *characters*.

Both pick the ending with the highest summed log-probability for `acc`, and the highest per unit of length for
`acc_norm`. Both encode `<|endoftext|>` in an item as ordinary text; no item of HellaSwag contains it.
"""

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from accelerate import Accelerator, PartialState
from transformers import PreTrainedTokenizerBase

from ..core.devices import compute_once
from ..core.errors import UserError
from .hellaswag_data import HellaSwagItem
from .shared_context import EncodedChoices, is_truncated

ITEMS_PER_ENCODING = 1000


@dataclass(frozen=True)
class EncodedItem(EncodedChoices):
    """An encoded item. `acc_norm` divides by `ending_lengths`, in tokens (`original`) or characters (`lm_eval`)."""

    ind: int
    label: int
    ending_lengths: tuple[int, ...]


@dataclass(frozen=True)
class EncodedHellaSwag:
    """Items encoded under a protocol, once for any number of checkpoints."""

    protocol: str
    items: tuple[EncodedItem, ...]

    @property
    def n_tokens(self) -> int:
        """Tokens in the model's input if each context is read once for all its endings."""
        return sum(item.n_read for item in self.items)

    @property
    def largest_id(self) -> int:
        """The largest token id in any item."""
        return max(max(*item.context_ids, *itertools.chain(*item.ending_ids)) for item in self.items)

    def count_truncated(self, max_positions: int | None) -> int:
        """Return how many contexts must be truncated on the left to fit a model.

        Raises:
            UserError: an ending does not fit even without its context.
        """
        return sum(is_truncated(item, max_positions) for item in self.items)


def render_original(item: HellaSwagItem) -> tuple[str, list[str]]:
    """Return the texts of the context and its continuations under the `original` protocol."""
    return item.ctx, [" " + ending for ending in item.endings]


def render_lm_eval(item: HellaSwagItem) -> tuple[str, list[str]]:
    """Return the texts of the context and its continuations under the `lm_eval` protocol.

    As in the harness, trailing spaces of the context move to the start of each continuation, so that the two meet at a
    word boundary.
    """
    prompt = clean_marks(f"{item.activity_label}: {item.ctx_a} {item.ctx_b.capitalize()}")
    context = prompt.rstrip()
    blanks = prompt[len(context) :]
    return context, [f"{blanks} {clean_marks(ending)}" for ending in item.endings]


def clean_marks(text: str) -> str:
    """Remove the `[header]`, `[title]` and `[step]` marks of the WikiHow half exactly as the harness does.

    The order of operations and the single pass over double spaces are part of the protocol: a text that starts with a
    mark keeps a leading space, and three spaces become two.
    """
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def encode_hellaswag(
    items: Sequence[HellaSwagItem], tokenizer: PreTrainedTokenizerBase, protocol: str
) -> EncodedHellaSwag:
    """Encode items under the protocol `original` or `lm_eval` with a transformers tokenizer.

    `original` encodes contexts and endings separately, without special tokens. `lm_eval` encodes the context alone and
    followed by each ending; the ending's tokens are those beyond the context's length. As in the harness, `lm_eval`
    keeps a special token that the tokenizer adds at the start of a text (GPT-2's adds none).

    Raises:
        UserError: a context or an ending encodes to no tokens.
    """
    is_joint = protocol == "lm_eval"
    rendered = map(render_lm_eval if is_joint else render_original, items)
    texts = [[context, *(is_joint * context + ending for ending in endings)] for context, endings in rendered]
    encoded = []
    for item, (context_ids, *ids) in zip(items, _encode(tokenizer, texts, add_special_tokens=is_joint), strict=True):
        ending_ids = [ending[len(context_ids) :] for ending in ids] if is_joint else ids
        if not context_ids or not all(ending_ids):
            raise UserError(
                f"the context or an ending of item {item.ind} encodes to no tokens: replace the tokenizer in the "
                "model's folder with the one that it was trained with"
            )
        lengths = tuple(map(len, map(clean_marks, item.endings) if is_joint else ending_ids))
        encoded.append(EncodedItem(context_ids, ending_ids, item.ind, item.label, lengths))
    return EncodedHellaSwag(protocol, tuple(encoded))


class HellaSwagQuestions:
    """Items that are encoded lazily under each protocol, once for all processes.

    `encode` and `check_fits` are collective: all processes must call them.
    """

    def __init__(
        self,
        items: Sequence[HellaSwagItem],
        tokenizer: PreTrainedTokenizerBase,
        accelerator: Accelerator | PartialState,
    ):
        self.items, self.tokenizer, self.accelerator = items, tokenizer, accelerator
        self._encoded: dict[str, EncodedHellaSwag] = {}

    def encode(self, protocol: str) -> EncodedHellaSwag:
        """Return the items encoded under the protocol `original` or `lm_eval` (see `encode_hellaswag`)."""
        if protocol not in self._encoded:
            encode = partial(encode_hellaswag, self.items, self.tokenizer, protocol)
            self._encoded[protocol] = compute_once(encode, self.accelerator)
        return self._encoded[protocol]

    def check_fits(self, max_positions: int | None) -> None:
        """Check that all endings fit a model, under both protocols.

        The protocols render endings almost identically, so only items with long endings under `original` are encoded
        under `lm_eval` too.

        Raises:
            UserError: an ending is too long.
        """
        original = self.encode("original")
        original.count_truncated(max_positions)
        limit = math.inf if max_positions is None else max_positions / 2
        lengths = (max(map(len, encoded.ending_ids)) for encoded in original.items)
        long = [item for item, length in zip(self.items, lengths, strict=True) if length > limit]
        if long:
            encode_hellaswag(long, self.tokenizer, "lm_eval").count_truncated(max_positions)


def _encode(
    tokenizer: PreTrainedTokenizerBase, texts_by_item: list[list[str]], add_special_tokens: bool
) -> Iterator[list[list[int]]]:
    """Yield the ids of each item's texts. Large batches are several times faster to encode than small ones."""
    options = {"split_special_tokens": True, "return_attention_mask": False}
    for start in range(0, len(texts_by_item), ITEMS_PER_ENCODING):
        chunk = texts_by_item[start : start + ITEMS_PER_ENCODING]
        encoded = tokenizer(list(itertools.chain(*chunk)), add_special_tokens=add_special_tokens, **options)
        ids = iter(encoded["input_ids"])
        for texts in chunk:
            yield list(itertools.islice(ids, len(texts)))
