"""Inspecting a data folder: exact statistics in one pass over its shards, and a random sample of documents.

Everything is counted from the tokens on disk. Memory barely grows with the corpus: counts are kept per id, per chunk
and per document length, and n tokens make documents of at most sqrt(2n) different lengths (141,421 for ten billion
tokens).
"""

import collections
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from ..core.errors import UserError
from .shards import (
    MAX_VOCAB_SIZE,
    Manifest,
    Split,
    describe_ids_beyond,
    iterate_chunks,
    list_splits,
    load_manifest,
    map_files,
    read_tokens,
)
from .tokenizer import load_data_tokenizer, token_byte_lengths


@dataclasses.dataclass(frozen=True)
class Document:
    """A document in the shards.

    Attributes:
        position: of the end-of-text id that precedes it, in `file`.
        tokens: its length, including that id; it may continue in the next file.
        ids: uint16, without that id and truncated to the requested number.
    """

    split: Split
    file: str
    position: int
    tokens: int
    ids: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class SplitStatistics:
    """Statistics of one split.

    A document is an end-of-text id and everything up to the next one, across files; its length includes that id.

    Attributes:
        files: the split's shards, in order.
        text_bytes: UTF-8 bytes of the tokens' text.
        token_counts: occurrences of each id, int64 of shape `(vocab_size,)`.
        lengths: distinct document lengths in tokens, ascending, int64.
        length_counts: number of documents of each length.
        chunk_bounds: start of each chunk in the split, and end of the last one, int64 of shape `(chunks + 1,)`; no
            chunk spans two files.
        documents_before: number of documents that start before each bound, int64 of the same shape. Finding a document
            thus takes reading one chunk.
    """

    split: Split
    files: dict[Path, np.ndarray]
    eot_id: int
    text_bytes: int
    token_counts: np.ndarray
    lengths: np.ndarray
    length_counts: np.ndarray
    chunk_bounds: np.ndarray
    documents_before: np.ndarray

    @property
    def tokens(self) -> int:
        """Number of tokens in the split."""
        return int(self.chunk_bounds[-1])

    @property
    def documents(self) -> int:
        """Number of documents that start in the split."""
        return int(self.documents_before[-1])

    @property
    def tokens_before_first(self) -> int:
        """Number of tokens before the first end-of-text id: the remainder of a document that starts elsewhere."""
        return self.tokens - int(self.lengths @ self.length_counts)

    @property
    def ids_in_use(self) -> int:
        """Number of vocabulary ids that occur."""
        return int(np.count_nonzero(self.token_counts))

    @property
    def mean_length(self) -> float:
        """Mean number of tokens per document."""
        return int(self.lengths @ self.length_counts) / self.documents

    def find_length(self, percent: int) -> int:
        """Return a percentile of document lengths: the smallest that at least `percent` % of documents stay within."""
        return int(np.percentile(self.lengths, percent, weights=self.length_counts, method="inverted_cdf"))

    def list_most_common(self, count: int) -> list[int]:
        """Return the `count` most common ids that occur, most common first; ties are broken by the lower id."""
        order = np.argsort(-self.token_counts, kind="stable")[:count]
        return order[self.token_counts[order] > 0].tolist()

    def read_document(self, number: int, max_ids: int) -> Document:
        """Read document `number`, counted from 0 in split order, with up to `max_ids` of its ids."""
        start, end = self._find_start(number), self._find_start(number + 1)
        ids = read_tokens(self.files.values(), start + 1, min(end, start + 1 + max_ids))
        file_ends = np.cumsum([len(tokens) for tokens in self.files.values()])
        path, tokens = list(self.files.items())[np.searchsorted(file_ends, start, side="right")]
        position = start - int(file_ends[file_ends > start][0]) + len(tokens)
        return Document(self.split, path.name, position, end - start, ids)

    def _find_start(self, number: int) -> int:
        """Return the position in the split at which a document starts; for `number == documents`, the split's end."""
        if number == self.documents:
            return self.tokens
        chunk = int(np.searchsorted(self.documents_before, number, side="right")) - 1
        start, end = self.chunk_bounds[chunk : chunk + 2].tolist()
        positions = np.flatnonzero(read_tokens(self.files.values(), start, end) == self.eot_id)
        return start + int(positions[number - self.documents_before[chunk]])


@dataclasses.dataclass(frozen=True, eq=False)
class Inspection:
    """An inspected data folder: its manifest, if any, its tokenizer, statistics per split, and sampled documents."""

    folder: Path
    manifest: Manifest | None
    tokenizer: PreTrainedTokenizerFast
    splits: list[SplitStatistics]
    documents: list[Document]


def inspect_folder(folder: Path, n_documents: int, seed: int, max_ids: int) -> Inspection:
    """Compute statistics of `folder` and sample `n_documents` of its documents, with up to `max_ids` ids each.

    A folder without a manifest is assumed to use GPT-2's tokenizer. A progress bar is shown on stderr.

    Raises:
        UserError: the folder is missing, unfinished or without tokens, a shard or the manifest is damaged, or the
            tokenizer cannot be loaded, is not the shards' or lacks some of their ids.
    """
    manifest = load_manifest(folder)
    # If there are no shards, mapping the split that every folder has raises the error.
    files = {split: map_files(folder, split) for split in list_splits(folder) or ["train"]}
    total = sum(len(tokens) for of_split in files.values() for tokens in of_split.values())
    if not total:
        raise UserError(f"the shards of {folder} contain no tokens: prepare the folder again")
    tokenizer = load_data_tokenizer(folder)
    byte_lengths = token_byte_lengths(tokenizer)
    with tqdm(total=total, unit=" tokens", unit_scale=True, disable=None, delay=1) as bar:
        splits = [
            scan_split(split, of_split, tokenizer.eos_token_id, byte_lengths, bar.update)
            for split, of_split in files.items()
        ]
    return Inspection(folder, manifest, tokenizer, splits, choose_documents(splits, n_documents, seed, max_ids))


def scan_split(
    split: Split,
    files: dict[Path, np.ndarray],
    eot_id: int,
    byte_lengths: np.ndarray,
    report_progress: Callable[[int], Any] = lambda tokens: None,
) -> SplitStatistics:
    """Compute the statistics of one split in one pass.

    Args:
        files: the split's shards, in order.
        byte_lengths: UTF-8 bytes of each id, of shape `(vocab_size,)`.
        report_progress: called after each chunk with its number of tokens.

    Raises:
        UserError: a shard has an id of `vocab_size` or above.
    """
    vocab_size = len(byte_lengths)
    token_counts = np.zeros(MAX_VOCAB_SIZE, dtype=np.int64)
    length_counts: collections.Counter[int] = collections.Counter()
    chunk_bounds, documents_before = [0], [0]
    last_start = np.empty(0, dtype=np.int64)
    n_tokens = 0
    for path, tokens in files.items():
        for _, chunk in iterate_chunks(tokens):
            token_counts += np.bincount(chunk, minlength=MAX_VOCAB_SIZE)
            starts = n_tokens + np.flatnonzero(chunk == eot_id)
            documents_before.append(documents_before[-1] + len(starts))
            length_counts.update(np.diff(starts, prepend=last_start).tolist())
            last_start = starts[-1:] if len(starts) else last_start
            n_tokens += len(chunk)
            chunk_bounds.append(n_tokens)
            report_progress(len(chunk))
        if token_counts[vocab_size:].any():
            beyond = describe_ids_beyond(tokens, vocab_size)
            raise UserError(f"{path} {beyond}: it is damaged or was written with another tokenizer")
    length_counts.update((n_tokens - last_start).tolist())
    lengths = sorted(length_counts)
    return SplitStatistics(
        split=split,
        files=files,
        eot_id=eot_id,
        text_bytes=int(token_counts[:vocab_size] @ byte_lengths),
        token_counts=token_counts[:vocab_size],
        lengths=np.array(lengths, dtype=np.int64),
        length_counts=np.array([length_counts[length] for length in lengths], dtype=np.int64),
        chunk_bounds=np.array(chunk_bounds),
        documents_before=np.array(documents_before),
    )


def choose_documents(splits: Sequence[SplitStatistics], count: int, seed: int, max_ids: int) -> list[Document]:
    """Sample `count` documents uniformly without replacement from all splits, and read them in split order.

    The sample is a function of the seed and the number of documents. If there are at most `count`, all are read.
    """
    total = sum(split.documents for split in splits)
    generator = np.random.default_rng(seed)
    numbers = np.sort(generator.choice(total, min(count, total), replace=False, shuffle=False))
    documents: list[Document] = []
    for split in splits:
        of_split = numbers[numbers < split.documents]
        documents += [split.read_document(number, max_ids) for number in of_split.tolist()]
        numbers = numbers[len(of_split) :] - split.documents
    return documents
