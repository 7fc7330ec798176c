"""The global shuffle: which documents are validation, and the order of the training documents.

Everything here is a pure function of the seed and the documents in source order. It does not depend on how documents
are divided into files, on the number of workers or on the number of buckets.

FineWeb-Edu is stored in crawl order, and training in that order makes the loss periodic. Each training document
therefore gets a key, a 64-bit hash of its text keyed by the seed, and the documents are sorted by key.
"""

import dataclasses
import itertools

import numpy as np
import xxhash

KEY_SPACE = 2**64

# One tokenized document: its key, the offset of its tokens in the task's token file, its position in source order, and
# the number of its tokens (including the leading end-of-text id) and of its text's UTF-8 bytes.
DOCUMENT_DTYPE = np.dtype(
    [("key", "<u8"), ("offset", "<u8"), ("position", "<u8"), ("tokens", "<u4"), ("bytes", "<u8")], align=False
)


@dataclasses.dataclass(frozen=True)
class Selection:
    """The documents of each split, by position in source order.

    Positions [0, validation_documents) are validation and [validation_documents, documents) training; the rest is
    unused. If no document boundary is suitable, the first `cut_tokens` tokens of the first training document
    (`cut_bytes` of its text) are validation too.

    Attributes:
        validation_keys: sorted keys of the validation documents, uint64 of shape `(n,)`; training documents with one
            of these keys are dropped.
    """

    documents: int
    validation_documents: int
    cut_tokens: int
    cut_bytes: int
    validation_keys: np.ndarray


def hash_documents(offsets: np.ndarray, text: np.ndarray, seed: int) -> np.ndarray:
    """Return the documents' keys, uint64 of shape `(documents,)`: XXH3-64 of the UTF-8 bytes, seeded with `seed`."""
    view = text.data
    keys = [xxhash.xxh3_64_intdigest(view[start:end], seed) for start, end in itertools.pairwise(offsets.tolist())]
    return np.array(keys, dtype=np.uint64)


def order_by_key(documents: np.ndarray) -> np.ndarray:
    """Return the indices that sort `documents` (of `DOCUMENT_DTYPE`) by key, ties by position."""
    return np.lexsort((documents["position"], documents["key"]))


def divide_key_space(buckets: int) -> list[tuple[int, int]]:
    """Divide the key space into `buckets` equal ranges, each given by its first and last key."""
    bounds = [KEY_SPACE * i // buckets for i in range(buckets + 1)]
    return [(low, high - 1) for low, high in itertools.pairwise(bounds)]


def count_duplicates(sorted_keys: np.ndarray) -> int:
    """Return the number of keys equal to their predecessor."""
    return int(np.count_nonzero(sorted_keys[1:] == sorted_keys[:-1]))


def choose_validation_end(ends: np.ndarray, val_tokens: int, total_tokens: int) -> tuple[int, int]:
    """Choose the end of the validation split.

    It ends with the first document that reaches `val_tokens`. If all of the corpus would then be validation, or more
    than half although no more than half was requested (as in a corpus of one long text), the split ends inside that
    document, at exactly `val_tokens`.

    Args:
        ends: cumulative token counts of the documents, int64, up to at least the document that reaches `val_tokens`.

    Returns:
        The number of whole validation documents, and the number of tokens taken from the next document.
    """
    last = int(np.searchsorted(ends, val_tokens))
    end = int(ends[last])
    if end == total_tokens or (2 * end > total_tokens and 2 * val_tokens <= total_tokens):
        return last, val_tokens - (int(ends[last - 1]) if last else 0)
    return last + 1, 0


def select_validation(documents: np.ndarray, selection: Selection) -> np.ndarray:
    """Return the validation documents among `documents`, in source order, with the front of the cut one, if any."""
    chosen = documents[documents["position"] < selection.validation_documents + (selection.cut_tokens > 0)]
    chosen = chosen[np.argsort(chosen["position"])]
    is_cut = chosen["position"] == selection.validation_documents
    chosen["tokens"][is_cut] = selection.cut_tokens
    chosen["bytes"][is_cut] = selection.cut_bytes
    return chosen


def select_training(documents: np.ndarray, selection: Selection) -> tuple[np.ndarray, np.ndarray]:
    """Return the training documents among `documents`, and those dropped as copies of validation documents.

    Both are in the order of `documents`. Of the cut document, the remainder is returned, which has no end-of-text id.
    """
    position = documents["position"]
    candidates = documents[(position >= selection.validation_documents) & (position < selection.documents)]
    # Faster than `np.isin`, which would sort the validation keys on each of many calls with few documents.
    nearest = np.searchsorted(selection.validation_keys[:-1], candidates["key"])
    is_copy = selection.validation_keys[nearest] == candidates["key"]
    if selection.cut_tokens:
        is_cut = candidates["position"] == selection.validation_documents
        is_copy &= ~is_cut
        candidates["offset"][is_cut] += selection.cut_tokens
        candidates["tokens"][is_cut] -= selection.cut_tokens
        candidates["bytes"][is_cut] -= selection.cut_bytes
    return candidates[~is_copy], candidates[is_copy]
