"""The UTF-8 bytes of text behind the tokens of a validation, the unit of `val/bpb` (bits per byte).

The spellings of a byte-level tokenizer's tokens give them exactly. Other tokenizers change spaces, accents or case,
mark parts of words, or lack tokens for some of them; so the shards come with `text_bytes.npy`, the bytes of each
validation document as it was read.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from ..core.errors import UserError
from .dataset import TokenDataset
from .shards import TEXT_BYTES_NAME, TOKENS_PER_CHUNK, load_manifest, read_tokens
from .tokenizer import spells_text, token_byte_lengths

# Printed with an estimate.
NOTE = (
    "val/bpb is an estimate: the data folder does not say how many bytes of text its tokens stand for, and their "
    "spellings do not tell (made again with prepare_data.py, it does)"
)


@dataclass(frozen=True)
class TextBytes:
    """UTF-8 bytes of text; exact, but for the document in which they end, or an estimate."""

    count: float
    is_exact: bool


def save_text_bytes(folder: str | Path, document_bytes: np.ndarray) -> None:
    """Write the UTF-8 bytes of each validation document, in the order of the split."""
    np.save(Path(folder) / TEXT_BYTES_NAME, document_bytes.astype("<u8"))


def load_text_bytes(folder: str | Path) -> np.ndarray | None:
    """Read the UTF-8 bytes of each validation document, uint64 of shape `(documents,)`; None if the folder has none.

    Raises:
        UserError: a missing folder, or a manifest or file that cannot be read or contradicts the other.
    """
    manifest = load_manifest(folder)
    if manifest is None or TEXT_BYTES_NAME not in manifest.other_files:
        return None
    path = Path(folder) / TEXT_BYTES_NAME
    try:
        document_bytes = np.load(path, mmap_mode="r")
        is_right = document_bytes.dtype == np.uint64 and document_bytes.shape == (manifest.val.documents,)
    except Exception as error:  # numpy's parser of headers raises any of Python's errors
        raise UserError(f"{path} cannot be read ({error}): make the folder again with --overwrite") from error
    if not is_right or int(document_bytes.sum()) != manifest.val.bytes:
        raise UserError(f"{path} is not what the manifest counts: make the folder again with --overwrite")
    return document_bytes


def count_text_bytes(dataset: TokenDataset, n_windows: int, tokenizer: PreTrainedTokenizerFast) -> TextBytes:
    """Count the bytes that the targets of the first windows of a validation split stand for.

    The document in which the last window ends counts in part, by the spellings of its tokens. Spellings are also all
    there is for a folder that an older version or another program wrote.

    Raises:
        UserError: the folder's `text_bytes.npy` is damaged or contradicts its shards.
    """
    lengths = token_byte_lengths(tokenizer)
    end = min(n_windows, len(dataset)) * dataset.sequence_length + 1
    tokens = read_tokens(dataset.shards, 0, end)
    document_bytes = load_text_bytes(dataset.folder)
    if document_bytes is None:
        return TextBytes(_count_spelled(tokens[1:], lengths), spells_text(tokenizer))
    starts = np.flatnonzero(tokens == tokenizer.eos_token_id)
    if not 0 < len(starts) <= len(document_bytes):
        raise UserError(f"the validation shards of {dataset.folder} are damaged: prepare_data.py --verify says how")
    front = _count_spelled(tokens[starts[-1] :], lengths)
    whole = front + _count_spelled(_read_rest_of_document(dataset, end, tokenizer.eos_token_id), lengths)
    *before, cut = document_bytes[: len(starts)].tolist()
    return TextBytes(sum(before) + (cut * front / whole if whole else 0), is_exact=True)


def _count_spelled(tokens: np.ndarray, lengths: np.ndarray) -> int:
    """Return how many bytes the tokens' spellings have. Ids beyond the vocabulary count nothing: reading them to train
    raises the error."""
    return int(np.bincount(tokens, minlength=len(lengths))[: len(lengths)] @ lengths)


def _read_rest_of_document(dataset: TokenDataset, start: int, eot_id: int) -> np.ndarray:
    """Return the tokens from `start` to the end of the document that it is in."""
    pieces = [np.empty(0, np.uint16)]
    for position in range(start, dataset.n_tokens, TOKENS_PER_CHUNK):
        chunk = read_tokens(dataset.shards, position, position + TOKENS_PER_CHUNK)
        ends = np.flatnonzero(chunk == eot_id)
        pieces.append(chunk[: ends[0]] if len(ends) else chunk)
        if len(ends):
            break
    return np.concatenate(pieces)
