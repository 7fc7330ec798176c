"""The order of documents: which are validation, which are training, and where each training document goes.

Everything here is a function of the documents in source order and of the seed. How files divide the documents, how
many workers read them and how buckets divide the key space change nothing.

FineWeb-Edu keeps the order in which it was crawled, and training in that order makes the loss periodic; so each
training document gets a key, a 64-bit hash of its text under the seed, and documents are sorted by key.
"""

import dataclasses
import itertools

import numpy as np
import xxhash

KEY_SPACE = 2**64

# One tokenized document: its key, where its tokens begin in the task's file of tokens, its position in source order,
# the number of its tokens (with the end-of-text id in front) and of its text's UTF-8 bytes.
DOCUMENT_DTYPE = np.dtype(
    [("key", "<u8"), ("offset", "<u8"), ("position", "<u8"), ("tokens", "<u4"), ("bytes", "<u8")], align=False
)


@dataclasses.dataclass(frozen=True)
class Selection:
    """Which documents each split gets, by their position in source order.

    Positions below `validation_documents` are validation, those from there up to `documents` training; the rest is
    not used. If no boundary between documents is suitable, the first `cut_tokens` tokens of the first training
    document, `cut_bytes` of its text, are validation too.

    Attributes:
        validation_keys: sorted keys of the validation documents, uint64 of shape `(n,)`; training documents that have
            one are left out.
    """

    documents: int
    validation_documents: int
    cut_tokens: int
    cut_bytes: int
    validation_keys: np.ndarray


def hash_documents(offsets: np.ndarray, text: np.ndarray, seed: int) -> np.ndarray:
    """Return the documents' keys, uint64 of shape `(documents,)`: XXH3-64 of the UTF-8 bytes, keyed by `seed`."""
    view = memoryview(text)
    keys = [xxhash.xxh3_64_intdigest(view[start:end], seed) for start, end in itertools.pairwise(offsets.tolist())]
    return np.array(keys, dtype=np.uint64)


def order_by_key(documents: np.ndarray) -> np.ndarray:
    """Return the indices that sort `documents` (of `DOCUMENT_DTYPE`) by key, ties by position."""
    return np.lexsort((documents["position"], documents["key"]))


def divide_key_space(buckets: int) -> list[tuple[int, int]]:
    """Cut the keys into `buckets` ranges of equal size, each as its first and last key."""
    bounds = [KEY_SPACE * i // buckets for i in range(buckets + 1)]
    return [(low, high - 1) for low, high in itertools.pairwise(bounds)]


def count_repeated(sorted_keys: np.ndarray) -> int:
    """Return how many of these keys have an equal one before them."""
    return int(np.count_nonzero(sorted_keys[1:] == sorted_keys[:-1]))


def choose_validation_end(ends: np.ndarray, val_tokens: int, total_tokens: int) -> tuple[int, int]:
    """Decide where the validation split ends.

    It ends with the first document that reaches `val_tokens`. Where that document would take half of the corpus or
    more with it (one long text is all there is), the split ends inside it, at `val_tokens` exactly.

    Args:
        ends: the number of tokens up to the end of each document, int64, from the first document up to at least the
            one that reaches `val_tokens`.

    Returns:
        The number of whole validation documents, and the tokens taken from the document after them.
    """
    last = int(np.searchsorted(ends, val_tokens))
    end = int(ends[last])
    if end == total_tokens or (2 * end > total_tokens and 2 * val_tokens <= total_tokens):
        return last, val_tokens - (int(ends[last - 1]) if last else 0)
    return last + 1, 0


def select_validation(documents: np.ndarray, selection: Selection) -> np.ndarray:
    """Return the validation documents among `documents`, in source order; the one that is cut with its front."""
    chosen = documents[documents["position"] < selection.validation_documents + (selection.cut_tokens > 0)]
    chosen = chosen[np.argsort(chosen["position"])]
    is_cut = chosen["position"] == selection.validation_documents
    chosen["tokens"][is_cut] = selection.cut_tokens
    chosen["bytes"][is_cut] = selection.cut_bytes
    return chosen


def select_training(documents: np.ndarray, selection: Selection) -> tuple[np.ndarray, np.ndarray]:
    """Return the training documents among `documents` and those left out as copies of validation documents.

    Both keep the order of `documents`. The document that is cut comes with its rest, which has no end-of-text id.
    """
    position = documents["position"]
    candidates = documents[(position >= selection.validation_documents) & (position < selection.documents)]
    # Not `np.isin`, which sorts the validation keys again for the few documents of each bucket in each chunk.
    nearest = np.searchsorted(selection.validation_keys[:-1], candidates["key"])
    is_copy = selection.validation_keys[nearest] == candidates["key"]
    if selection.cut_tokens:
        is_cut = candidates["position"] == selection.validation_documents
        is_copy &= ~is_cut
        candidates["offset"][is_cut] += selection.cut_tokens
        candidates["tokens"][is_cut] -= selection.cut_tokens
        candidates["bytes"][is_cut] -= selection.cut_bytes
    return candidates[~is_copy], candidates[is_copy]
