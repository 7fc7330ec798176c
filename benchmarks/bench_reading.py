"""The time to the first and the next batch of a folder of a hundred shards, and to copy a shard to int64.

    python benchmarks/bench_reading.py [--shards 100] [--shard_tokens 10e6] [--rounds 5]

The peer is build-nanogpt's loader at the start of each shard: it reads the whole shard into an int64 tensor. The two
take turns. The shards are in the page cache for both. A batch is 64 windows of 1,025 tokens.
"""

import re
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measurements import Report, build_parser, time_call
from modeling_gpt2_repro.data.dataset import TokenDataset, prefetch
from modeling_gpt2_repro.data.order import WindowOrder

MICRO_BATCH, SEQUENCE_LENGTH, VOCAB_SIZE = 64, 1024, 50257


def write_shards(folder: Path, n_shards: int, shard_tokens: int) -> None:
    """Write shards of random ids."""
    generator = np.random.default_rng(0)
    for number in range(1, n_shards + 1):
        np.save(folder / f"x_train_{number:06d}.npy", generator.integers(0, VOCAB_SIZE, shard_tokens, np.uint16))


def time_copying(path: Path) -> float:
    """Return the seconds to read a shard into an int64 tensor."""
    return time_call(lambda: torch.tensor(np.load(path).astype(np.int32), dtype=torch.long))


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


def time_finding_windows(n_windows: int, step: int) -> list[float]:
    """Return the milliseconds to compute which 512 windows a permuted step reads, for each of fifty steps."""
    order = WindowOrder(n_windows, seed=0)
    return [1e3 * time_call(lambda offset=offset: order.windows_of_step(step + offset, 512)) for offset in range(50)]


def read_epoch(folder: Path, first_permuted_epoch: int) -> tuple[list[float], float]:
    """Return the milliseconds of each batch of an epoch, and the growth of anonymous memory in MB."""
    dataset, micro_batches, batches = open_batches(folder, first_permuted_epoch)
    batches.close()
    dataset.read(next(micro_batches))
    before = read_anonymous_megabytes()
    waits = [1e3 * time_call(lambda windows=windows: dataset.read(windows)) for windows in micro_batches]
    return waits, read_anonymous_megabytes() - before


def read_first_batch(folder: Path) -> float:
    """Return the milliseconds from opening a folder to its first batch."""
    started = time.perf_counter()
    _, _, batches = open_batches(folder, first_permuted_epoch=1)
    next(batches)
    milliseconds = 1e3 * (time.perf_counter() - started)
    batches.close()
    return milliseconds


def main(argv: list[str] | None = None) -> None:
    parser = build_parser(__doc__, "reading")
    parser.add_argument("--shards", type=int, default=100)
    parser.add_argument("--shard_tokens", type=float, default=10e6)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(argv)
    report = Report("reading", options)
    first, copying, growth = [], [], {}
    waits: dict[str, list[float]] = {"next batch, in order": [], "next batch, permuted": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_shards(folder, options.shards, int(options.shard_tokens))
        for number in range(options.rounds):
            first.append(read_first_batch(folder))
            copying.append(1e3 * time_copying(folder / f"x_train_{number % options.shards + 1:06d}.npy"))
            for order, first_permuted_epoch in zip(waits, (1, 0), strict=True):
                times, growth[order] = read_epoch(folder, first_permuted_epoch)
                waits[order] += times
    part = f"{options.shards} shards of {options.shard_tokens / 1e6:g} M tokens"
    copy = "copying a shard to int64"
    report.add_median(part, "first batch, after opening the folder", first, "ms")
    report.add_median(part, copy, copying, "ms")
    for order, times in waits.items():
        report.add(part, order, statistics.median(times), "ms", statistic=f"median of {len(times):,}")
        report.add(part, order, np.quantile(times, 0.999), "ms, 99.9th percentile")
        report.add(part, order, growth[order], "MB of anonymous memory per epoch", statistic="last epoch")
        report.compare(part, order, copy)
    for n_windows in (10**4, 10**7, 10**10):
        for step in (1, 10**9):
            times = time_finding_windows(n_windows, step)
            report.add_median("windows of a permuted step", f"{n_windows:,} windows, step {step:,}", times, "ms")
    report.write(options.output)


if __name__ == "__main__":
    main()
