"""How many bytes of text the tokens of a validation stand for, in which `val/bpb` (bits a byte) is measured.

The spellings of byte-level tokenizers' tokens tell it. Others change spaces, accents or case, mark the parts of words,
or know a word or not; so the shards come with the bytes of each validation document, as they were read.
"""

from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerFast

from modeling_gpt2_repro.core.errors import UserError
from modeling_gpt2_repro.data.dataset import TokenDataset
from modeling_gpt2_repro.data.shards import MAX_VOCAB_SIZE, TOKENS_PER_CHUNK, iterate_chunks, load_text_bytes
from modeling_gpt2_repro.data.tokenizer import spells_text, token_byte_lengths

# What to tell of an estimate.
NOTE = (
    "val/bpb is an estimate: the data folder does not say how many bytes of text its tokens stand for, and their "
    "spellings do not tell (made again with prepare_data.py, it does)"
)


@dataclass(frozen=True)
class TextBytes:
    """UTF-8 bytes of text; `is_exact` but for the document in which they end, or else an estimate."""

    count: float
    is_exact: bool


def count_text_bytes(dataset: TokenDataset, n_windows: int, tokenizer: PreTrainedTokenizerFast) -> TextBytes:
    """Count the bytes that the targets of the first windows of a validation split stand for.

    The document in which the last window ends counts in part, by the spellings of its tokens. Spellings are all there
    is of a folder that an older version or another program wrote.

    Raises:
        UserError: what the folder says of its documents' bytes is damaged.
    """
    lengths = token_byte_lengths(tokenizer)
    end = min(n_windows, len(dataset)) * dataset.sequence_length + 1
    tokens = _read_tokens(dataset, 0, end)
    document_bytes = load_text_bytes(dataset.folder)
    if document_bytes is None:
        return TextBytes(_count_spelled(tokens[1:], lengths), spells_text(tokenizer))
    starts = np.flatnonzero(tokens == tokenizer.eos_token_id)
    if not 0 < len(starts) <= len(document_bytes):
        raise UserError(f"the validation shards of {dataset.folder} are damaged: prepare_data.py --verify says how")
    *_, last = starts
    front = _count_spelled(tokens[last:], lengths)
    whole = front + _count_spelled(_read_up_to(dataset, end, tokenizer.eos_token_id), lengths)
    *before, cut = document_bytes[: len(starts)].tolist()
    return TextBytes(sum(before) + (cut * front / whole if whole else 0), is_exact=True)


def _count_spelled(tokens: np.ndarray, lengths: np.ndarray) -> int:
    """Return how many bytes the tokens' spellings have; ids that are none are found where they are trained on."""
    counts = np.zeros(MAX_VOCAB_SIZE, np.int64)
    for _, chunk in iterate_chunks(tokens):
        counts += np.bincount(chunk, minlength=MAX_VOCAB_SIZE)
    return int(counts[: len(lengths)] @ lengths)


def _read_up_to(dataset: TokenDataset, start: int, eot_id: int) -> np.ndarray:
    """Return the tokens from `start` to the end of the document that it is in."""
    pieces = [np.empty(0, np.uint16)]
    for position in range(start, dataset.n_tokens, TOKENS_PER_CHUNK):
        chunk = _read_tokens(dataset, position, position + TOKENS_PER_CHUNK)
        ends = np.flatnonzero(chunk == eot_id)
        pieces.append(chunk[: ends[0]] if len(ends) else chunk)
        if len(ends):
            break
    return np.concatenate(pieces)


def _read_tokens(dataset: TokenDataset, start: int, end: int) -> np.ndarray:
    firsts = dataset.shard_ends - [len(shard) for shard in dataset.shards]
    pairs = zip(firsts.tolist(), dataset.shards, strict=True)
    return np.concatenate([shard[max(0, start - first) : max(0, end - first)] for first, shard in pairs])
