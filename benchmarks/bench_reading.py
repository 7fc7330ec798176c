"""The time to the first and the next batch of a folder of a hundred shards, beside copying shards to int64.

    python benchmarks/bench_reading.py [--shards 100] [--shard_tokens 10e6] [--rounds 5]

The peer is what build-nanogpt's loader does at the start of every shard: read it whole and make an int64 tensor of it.
It takes turns with ours. The shards are in the page cache for both. A batch is 64 windows of 1,025 tokens.
"""

import argparse
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from modeling_gpt2_repro.data.dataset import TokenDataset, prefetch
from modeling_gpt2_repro.data.order import WindowOrder

MICRO_BATCH, SEQUENCE_LENGTH, VOCAB_SIZE = 64, 1024, 50257


def write_shards(folder: Path, n_shards: int, shard_tokens: int) -> None:
    """Write shards of random ids."""
    generator = np.random.default_rng(0)
    for number in range(1, n_shards + 1):
        np.save(folder / f"x_train_{number:06d}.npy", generator.integers(0, VOCAB_SIZE, shard_tokens, np.uint16))


def time_copying(path: Path) -> float:
    """Return the seconds in which a shard becomes an int64 tensor."""
    started = time.perf_counter()
    torch.tensor(np.load(path).astype(np.int32), dtype=torch.long)
    return time.perf_counter() - started


def read_anonymous_megabytes() -> float:
    """Return this process's resident anonymous memory (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) / 1024


def open_batches(folder: Path, first_permuted_epoch: int):
    """Open a folder as the training loop does; return the dataset and an iterator over an epoch's batches."""
    dataset = TokenDataset(str(folder), "train", SEQUENCE_LENGTH, VOCAB_SIZE)
    order = WindowOrder(len(dataset), seed=0, first_permuted_epoch=first_permuted_epoch)
    steps = range(len(dataset) // MICRO_BATCH)
    micro_batches = order.divide_steps(steps, MICRO_BATCH, n_ranks=1, rank=0, micro_batch_size=MICRO_BATCH)
    return dataset, micro_batches, prefetch(dataset, micro_batches, torch.device("cpu"))


def time_finding_windows(n_windows: int, step: int) -> float:
    """Return the median seconds in which the 512 windows of a permuted step are found."""
    order = WindowOrder(n_windows, seed=0)
    seconds = []
    for offset in range(50):
        started = time.perf_counter()
        order.windows_of_step(step + offset, 512)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=100)
    parser.add_argument("--shard_tokens", type=float, default=10e6)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    first, copying, waits = [], [], {"in order": [], "permuted": []}
    growth = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_shards(folder, arguments.shards, int(arguments.shard_tokens))
        for round_ in range(arguments.rounds):
            started = time.perf_counter()
            _, _, batches = open_batches(folder, first_permuted_epoch=1)
            next(batches)
            first.append(time.perf_counter() - started)
            batches.close()
            copying.append(time_copying(folder / f"x_train_{round_ % arguments.shards + 1:06d}.npy"))
            for order, first_permuted_epoch in (("in order", 1), ("permuted", 0)):
                dataset, micro_batches, batches = open_batches(folder, first_permuted_epoch)
                batches.close()
                dataset.read(next(micro_batches))
                before = read_anonymous_megabytes()
                for windows in micro_batches:
                    started = time.perf_counter()
                    dataset.read(windows)
                    waits[order].append(time.perf_counter() - started)
                growth[order] = read_anonymous_megabytes() - before
    copy = statistics.median(copying)
    print(f"first batch       {1e3 * statistics.median(first):8.2f} ms after opening {arguments.shards} shards")
    for n_windows in (10**4, 10**7, 10**10):
        near, far = (1e3 * time_finding_windows(n_windows, step) for step in (1, 10**9))
        print(f"windows of a step {near:8.2f} ms at step 1 and {far:.2f} ms at step 10^9, of {n_windows:,} windows")
    print(f"copying a shard   {1e3 * copy:8.2f} ms of {arguments.shard_tokens / 1e6:.0f} M tokens")
    for order, seconds in waits.items():
        median, worst = statistics.median(seconds), np.quantile(seconds, 0.999)
        print(
            f"next batch        {1e3 * median:8.2f} ms {order}, {1e3 * worst:.2f} ms at the 99.9th percentile (which "
            f"straddle shards too): copying takes {copy / median:.0f} times as long; "
            f"RssAnon grew by {growth[order]:.1f} MB in an epoch"
        )


if __name__ == "__main__":
    main()
