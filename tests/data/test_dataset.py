"""Windows of memory-mapped shards."""

import re
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from modeling_gpt2_repro.core.devices import enter_device, name_device
from modeling_gpt2_repro.core.errors import UserError
from modeling_gpt2_repro.data import dataset as data_module
from modeling_gpt2_repro.data.dataset import TokenDataset, prefetch


def write_shards(folder: Path, *lengths: int) -> np.ndarray:
    tokens = np.random.default_rng(0).integers(0, 50257, sum(lengths)).astype(np.uint16)
    for number, shard in enumerate(np.split(tokens, np.cumsum(lengths)[:-1]), start=1):
        np.save(folder / f"x_train_{number:06d}.npy", shard)
    return tokens


@pytest.mark.parametrize("lengths", [(100,), (37, 63), (10, 3, 1, 50, 36)])
def test_windows_are_the_token_stream_for_any_shard_sizes(tmp_path, lengths):
    tokens = write_shards(tmp_path, *lengths)
    dataset = TokenDataset(tmp_path, "train", 8, vocab_size=50257)
    assert len(dataset) == (100 - 1) // 8
    windows = dataset.read(np.arange(len(dataset)))
    assert windows.dtype == torch.int64 and windows.shape == (12, 9)
    expected = np.stack([tokens[8 * i : 8 * i + 9] for i in range(12)])
    assert np.array_equal(windows.numpy(), expected)
    assert torch.equal(dataset[11], windows[11])


def test_last_window_ends_at_the_last_token(tmp_path):
    tokens = write_shards(tmp_path, 33)
    dataset = TokenDataset(tmp_path, "train", 8, vocab_size=50257)
    assert len(dataset) == 4
    assert dataset[3][-1] == tokens[-1]


def test_token_ids_beyond_the_vocabulary_are_rejected(tmp_path):
    tokens = write_shards(tmp_path, 33)
    with pytest.raises(UserError, match=f"token id {tokens.max()}, but the model's vocabulary has 300"):
        TokenDataset(tmp_path, "train", 8, vocab_size=300).read([0, 1, 2, 3])


def test_fewer_tokens_than_a_window_are_rejected(tmp_path):
    write_shards(tmp_path, 8)
    with pytest.raises(UserError, match="8 tokens, fewer than one window of 9"):
        TokenDataset(tmp_path, "train", 8, vocab_size=50257)


def read_anonymous_memory() -> int:
    """Return this process's resident anonymous memory in bytes (Linux)."""
    return 1024 * int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RssAnon is read from Linux's /proc")
def test_anonymous_memory_does_not_grow_with_the_corpus(tmp_path):
    n_tokens = 60_000_000
    np.lib.format.open_memmap(tmp_path / "x_train_000001.npy", "w+", np.uint16, (n_tokens,))
    dataset = TokenDataset(tmp_path, "train", 1024, vocab_size=50257)
    dataset.read(np.arange(64))
    before = read_anonymous_memory()
    for start in range(0, len(dataset) - 64, 64):
        dataset.read(np.arange(start, start + 64))
    assert read_anonymous_memory() - before < n_tokens * 2 / 10


def build_batches(n_windows: int, size: int = 3) -> list[np.ndarray]:
    return np.random.default_rng(0).permutation(n_windows)[: n_windows // size * size].reshape(-1, size)


def test_reading_ahead_gives_the_same_batches_in_order(tmp_path):
    np.save(tmp_path / "train_000001.npy", np.arange(1000, dtype=np.uint16))
    dataset = TokenDataset(str(tmp_path), "train", 8, 1000)
    micro_batches = build_batches(len(dataset))
    batches = list(prefetch(dataset, iter(micro_batches), torch.device("cpu")))
    assert len(batches) == len(micro_batches)
    assert all(torch.equal(batch, dataset.read(ids)) for batch, ids in zip(batches, micro_batches, strict=True))


def test_reading_ahead_raises_errors_with_their_batch_and_leaves_no_thread(tmp_path):
    tokens = np.arange(1000, dtype=np.uint16)
    tokens[500] = 60_000
    np.save(tmp_path / "train_000001.npy", tokens)
    dataset = TokenDataset(str(tmp_path), "train", 10, 1000)
    in_order = np.arange(99)[:, None]
    n_read = 0
    with pytest.raises(UserError, match="token id 60000"):
        for _ in prefetch(dataset, in_order, torch.device("cpu")):
            n_read += 1
    assert n_read == 49  # window 49 contains tokens 490 to 500

    others = set(threading.enumerate())
    batches = prefetch(dataset, in_order, torch.device("cpu"))
    next(batches)
    batches.close()
    assert set(threading.enumerate()) <= others


def test_the_reader_uses_the_device_of_its_batches(tmp_path, monkeypatch):
    np.save(tmp_path / "train_000001.npy", np.arange(1000, dtype=np.uint16))
    device, entered, readers = torch.device("cpu"), [], set()
    monkeypatch.setattr(
        data_module, "enter_device", lambda device: entered.append((device, threading.current_thread().name))
    )
    dataset = TokenDataset(str(tmp_path), "train", 8, 1000)
    read = dataset.read
    monkeypatch.setattr(dataset, "read", lambda ids: (readers.add(threading.current_thread().name), read(ids))[1])
    list(prefetch(dataset, build_batches(len(dataset)), device))
    ((entered_device, thread),) = entered
    assert entered_device == device and {thread} == readers and thread != threading.current_thread().name


def test_a_cuda_device_is_selected_by_its_index(monkeypatch):
    entered = []
    monkeypatch.setattr(torch.cuda, "set_device", entered.append)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    for device in ("cuda", "cuda:1", "cpu"):
        enter_device(name_device(torch.device(device)))
    assert entered == [torch.device("cuda:3"), torch.device("cuda:1")]
