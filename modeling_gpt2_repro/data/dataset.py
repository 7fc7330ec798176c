"""Reading windows of T+1 tokens from memory-mapped shards."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Protocol

import numpy as np
import torch

from ..core.devices import enter_device, name_device
from ..core.errors import UserError
from .shards import Split, load_manifest, open_split

# Micro-batches to prefetch; each is half a megabyte at 64 x 1,024 tokens.
PREFETCHED = 4


class Windows(Protocol):
    """Windows of T+1 tokens, by index: a `TokenDataset`, or a sequence of tensors."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> torch.Tensor: ...


class TokenDataset(torch.utils.data.Dataset[torch.Tensor]):
    """The windows of one split. Window i is tokens [i*T, (i+1)*T]; its last token is the first of the next window.

    A window thus provides T inputs and T targets, and may span shards. Only pages that are read are loaded, so memory
    does not grow with the corpus.

    Args:
        folder: the shards and, if `prepare_data.py` wrote them, their manifest.
        split: `train` or `val`.
        sequence_length: T, in tokens.
        vocab_size: number of ids in the model's vocabulary; reading a larger id is an error.

    Raises:
        UserError: the folder has no readable shards, or fewer tokens than one window.
    """

    def __init__(self, folder: str, split: Split, sequence_length: int, vocab_size: int):
        self.folder, self.split = folder, split
        self.sequence_length, self.vocab_size = sequence_length, vocab_size
        self.manifest = load_manifest(folder)
        # Plain arrays, because slicing an `np.memmap` takes ten times as long.
        self.shards = [np.asarray(shard) for shard in open_split(folder, split)]
        self.shard_ends = np.cumsum([len(shard) for shard in self.shards])
        self.n_tokens = int(self.shard_ends[-1])
        self.n_windows = (self.n_tokens - 1) // sequence_length
        if self.n_windows < 1:
            raise UserError(
                f"the {split} split of {folder} has {self.n_tokens:,} tokens, fewer than one window of "
                f"{sequence_length + 1:,}: prepare more text or lower --sequence_length"
            )

    @property
    def is_shuffled(self) -> bool:
        """Whether the documents are in random order, according to the manifest."""
        return self.manifest is not None and self.manifest.shuffled

    def __len__(self) -> int:
        return self.n_windows

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.read([range(self.n_windows)[index]])[0]

    def read(self, windows: Sequence[int] | np.ndarray) -> torch.Tensor:
        """Return windows by index, each in [0, len(self)), as int64 of shape (len(windows), T+1).

        Raises:
            UserError: a token id is outside the model's vocabulary.
        """
        tokens = np.concatenate(self._list_pieces(np.asarray(windows, dtype=np.int64)))
        if tokens.max() >= self.vocab_size:
            raise UserError(
                f"the {self.split} split of {self.folder} has token id {tokens.max()}, but the model's vocabulary has "
                f"{self.vocab_size:,} ids: prepare the data with the model's tokenizer"
            )
        return torch.from_numpy(tokens.astype(np.int64)).view(len(windows), -1)

    def _list_pieces(self, windows: np.ndarray) -> list[np.ndarray]:
        """Return views of the shards that make up `windows` in order, one or more per window."""
        starts = windows * self.sequence_length
        shards = np.searchsorted(self.shard_ends, starts, side="right")
        pieces = []
        for shard, before_end in zip(shards.tolist(), (self.shard_ends[shards] - starts).tolist(), strict=True):
            offset, missing = len(self.shards[shard]) - before_end, self.sequence_length + 1
            while missing:
                piece = self.shards[shard][offset : offset + missing]
                pieces.append(piece)
                shard, offset, missing = shard + 1, 0, missing - len(piece)
        return pieces


def prefetch(
    dataset: TokenDataset, micro_batches: Iterable[np.ndarray], device: torch.device
) -> Iterator[torch.Tensor]:
    """Yield `dataset.read(micro_batch)` on `device` for each of `micro_batches`, in order, prefetching `PREFETCHED`.

    A thread iterates over `micro_batches` and reads them. Batches for a CUDA device are pinned, so copying them is
    asynchronous. A read error is raised when its batch is due. The thread ends with the iterator, whether exhausted or
    closed, and never blocks on the consumer: breaking out of the loop leaves nothing behind.

    One thread suffices, and a process would only add a copy: a batch in the page cache takes 0.1 ms, and numpy
    releases the GIL while it waits for the disk (80 ms for permuted windows on a cold SSD).
    """
    windows = iter(micro_batches)
    pin = device.type == "cuda"

    def read_next() -> torch.Tensor | None:
        micro_batch = next(windows, None)
        if micro_batch is None:
            return None
        batch = dataset.read(micro_batch)
        return batch.pin_memory() if pin else batch

    # New threads start on GPU 0, where pinning memory would create a second context in the other GPUs' processes.
    enter = partial(enter_device, name_device(device))
    with ThreadPoolExecutor(1, thread_name_prefix="read-ahead", initializer=enter) as reader:
        batches = deque(reader.submit(read_next) for _ in range(PREFETCHED))
        while (batch := batches.popleft().result()) is not None:
            batches.append(reader.submit(read_next))
            yield batch.to(device, non_blocking=True)
