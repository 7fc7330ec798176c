"""What it costs that a CPU gives the same bits at every call: steps with that and without, in turns.

    python benchmarks/bench_determinism.py [--model_size 124M] [--batch_size 2] [--sequence_length 1024] [--rounds 30]

Both are the step of `bench_training_step.py` as train.py makes it, each compiled in a process of its own. They take
turns, and which of the two comes first alternates. The figure is the median of the ratios of two neighbouring steps;
the interval is the one between order statistics that covers the median with a probability of 95 %.
"""

import argparse
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.bench_training_step import WARMUP_STEPS, OurLoop
from benchmarks.measurements import Result, describe_machine, format_table, write_results
from modeling_gpt2_repro import MODEL_SIZES
from modeling_gpt2_repro.core import launch

RESULTS = Path(__file__).resolve().parent / "results" / "determinism.json"
PEERS = ("deterministic", "free")


def serve(name: str, options: argparse.Namespace, connection: Connection) -> None:
    """Build a step, and send its seconds whenever it is asked for one."""
    if name == "free":
        mock.patch.object(launch, "compute_deterministically", lambda is_wanted: None).start()
    loop = OurLoop(options, options.compile)
    for _ in range(WARMUP_STEPS):
        loop.step()
    connection.send(True)
    while connection.recv():
        started = time.perf_counter()
        loop.step()
        connection.send(time.perf_counter() - started)


def measure(options: argparse.Namespace) -> dict[str, list[float]]:
    """Return the seconds of each measured step, by peer."""
    context = multiprocessing.get_context("spawn")
    connections = {}
    for name in PEERS:
        connections[name], theirs = context.Pipe()
        context.Process(target=serve, args=(name, options, theirs), daemon=True).start()
        theirs.close()  # or a peer's death would not show as the end of its connection
        connections[name].recv()
    seconds: dict[str, list[float]] = {name: [] for name in PEERS}
    for number in range(options.rounds):
        for name in PEERS if number % 2 else reversed(PEERS):
            connections[name].send(True)
            seconds[name].append(connections[name].recv())
    for connection in connections.values():
        connection.send(False)
    return seconds


def find_median_interval(values: list[float], coverage: float = 0.95) -> tuple[float, float]:
    """Return the narrowest pair of order statistics, the same number from either end, that covers the median."""
    n, left_out, outside = len(values), 0, 0.0
    while (outside := outside + 2 * math.comb(n, left_out) / 2**n) <= 1 - coverage:
        left_out += 1
    ordered = sorted(values)
    return ordered[max(0, left_out - 1)], ordered[-max(1, left_out)]


def main() -> None:
    """Print the ratio of the steps' seconds, and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_size", default="124M", choices=MODEL_SIZES)
    parser.add_argument("--batch_size", type=int, default=2, help="sequences at once")
    parser.add_argument("--sequence_length", type=int, default=1024, help="tokens")
    parser.add_argument("--compile", default="on", choices=["on", "off"])
    parser.add_argument("--rounds", type=int, default=30, help="measured steps of each")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()

    machine = describe_machine()
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        seconds = measure(options)
    ratios = [ours / theirs for ours, theirs in zip(*(seconds[name] for name in PEERS), strict=True)]
    low, high = find_median_interval(ratios)
    part = f"{options.model_size}, {options.batch_size} x {options.sequence_length}, compile {options.compile}"
    results = [Result(part, name, statistics.median(times), "s") for name, times in seconds.items()]
    results += [
        Result(part, "deterministic / free", statistics.median(ratios), "median ratio"),
        Result(part, "deterministic / free", low, "95 % from"),
        Result(part, "deterministic / free", high, "95 % to"),
    ]
    print(format_table(results, []))
    write_results(options.output, "determinism", results, [], machine)


if __name__ == "__main__":
    main()
