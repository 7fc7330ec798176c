"""Number of UTF-8 bytes behind validation tokens, for `val/bpb` (bits per byte).

A byte-level tokenizer's token spellings give it exactly. Other tokenizers change spaces, accents or case, mark parts
of words, or lack tokens for some text. The data folder therefore contains `text_bytes.npy`: the number of bytes of
each validation document as it was read.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from ..core.errors import UserError
from .dataset import TokenDataset
from .shards import TEXT_BYTES_NAME, TOKENS_PER_CHUNK, load_manifest, read_tokens
from .tokenizer import spells_text, token_byte_lengths

# Printed if the count is an estimate.
NOTE = (
    "val/bpb is an estimate: the data folder does not record the bytes of its text, and the tokens' spellings do not "
    "determine them (rebuild the folder with prepare_data.py)"
)


@dataclass(frozen=True)
class TextBytes:
    """A number of UTF-8 bytes of text: exact, up to the document in which it ends, or an estimate."""

    count: float
    is_exact: bool


def save_text_bytes(folder: str | Path, document_bytes: np.ndarray) -> None:
    """Save the number of UTF-8 bytes of each validation document, in split order."""
    np.save(Path(folder) / TEXT_BYTES_NAME, document_bytes.astype("<u8"))


def load_text_bytes(folder: str | Path) -> np.ndarray | None:
    """Load the number of UTF-8 bytes of each validation document, uint64 of shape `(documents,)`.

    Returns:
        `None` if the folder does not record them.

    Raises:
        UserError: the folder is missing, the manifest or the file cannot be read, or they contradict each other.
    """
    manifest = load_manifest(folder)
    if manifest is None or TEXT_BYTES_NAME not in manifest.other_files:
        return None
    path = Path(folder) / TEXT_BYTES_NAME
    try:
        document_bytes = np.load(path, mmap_mode="r")
        is_right = document_bytes.dtype == np.uint64 and document_bytes.shape == (manifest.val.documents,)
    except Exception as error:  # numpy's header parser raises errors of any type
        raise UserError(f"cannot read {path} ({error}): rebuild the folder with --overwrite") from error
    if not is_right or int(document_bytes.sum()) != manifest.val.bytes:
        raise UserError(f"{path} contradicts the manifest: rebuild the folder with --overwrite")
    return document_bytes


def count_text_bytes(dataset: TokenDataset, n_windows: int, tokenizer: PreTrainedTokenizerFast) -> TextBytes:
    """Count the UTF-8 bytes of the targets of a validation split's first `n_windows` windows.

    The document in which the last window ends is counted in proportion to the spellings of its tokens. For a folder
    without `text_bytes.npy` (of an older version or another program), spellings are used throughout.

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
        raise UserError(f"the validation shards of {dataset.folder} are damaged: prepare_data.py --verify lists how")
    front = _count_spelled(tokens[starts[-1] :], lengths)
    whole = front + _count_spelled(_read_rest_of_document(dataset, end, tokenizer.eos_token_id), lengths)
    *before, cut = document_bytes[: len(starts)].tolist()
    return TextBytes(sum(before) + (cut * front / whole if whole else 0), is_exact=True)


def _count_spelled(tokens: np.ndarray, lengths: np.ndarray) -> int:
    """Return the number of bytes in the tokens' spellings.

    Ids beyond the vocabulary are ignored: evaluating the model on them raises the error.
    """
    return int(np.bincount(tokens, minlength=len(lengths))[: len(lengths)] @ lengths)


def _read_rest_of_document(dataset: TokenDataset, start: int, eot_id: int) -> np.ndarray:
    """Return the tokens from `start` to the end of its document."""
    pieces = [np.empty(0, np.uint16)]
    for position in range(start, dataset.n_tokens, TOKENS_PER_CHUNK):
        chunk = read_tokens(dataset.shards, position, position + TOKENS_PER_CHUNK)
        ends = np.flatnonzero(chunk == eot_id)
        pieces.append(chunk[: ends[0]] if len(ends) else chunk)
        if len(ends):
            break
    return np.concatenate(pieces)
