"""The cost of a CPU's reproducible bits: training steps with and without them, taking turns.

    python benchmarks/bench_determinism.py [--model_size 124M] [--batch_size 2] [--sequence_length 1024] [--rounds 30]

Both are the step of `bench_training_step.py` as train.py makes it, each compiled in a process of its own. The one that
comes first alternates. The result is the median ratio of two neighboring steps' times, with the interval between order
statistics that contains the true median with a probability of 95 %.
"""

import argparse
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.bench_training_step import WARMUP_STEPS, OurLoop
from benchmarks.measurements import SHAPES, Report, build_parser, time_call
from modeling_gpt2_repro.core import launch

PEERS = ("deterministic", "nondeterministic")


def serve(name: str, options: argparse.Namespace, connection: Connection) -> None:
    """Build a training loop, and send the seconds of a step for each request."""
    if name == "nondeterministic":
        mock.patch.object(launch, "compute_deterministically", lambda is_wanted: None).start()
    loop = OurLoop(options, options.compile)
    for _ in range(WARMUP_STEPS):
        loop.step()
    connection.send(True)
    while connection.recv():
        connection.send(time_call(loop.step))


def measure(options: argparse.Namespace) -> dict[str, list[float]]:
    """Return the seconds of each measured step, by peer."""
    context = multiprocessing.get_context("spawn")
    connections = {}
    for name in PEERS:
        connections[name], theirs = context.Pipe()
        context.Process(target=serve, args=(name, options, theirs), daemon=True).start()
        theirs.close()  # or the death of a peer would not end its connection
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
    """Return the narrowest pair of order statistics, equally far from both ends, that covers the median."""
    n, left_out, outside = len(values), 0, 0.0
    while (outside := outside + 2 * math.comb(n, left_out) / 2**n) <= 1 - coverage:
        left_out += 1
    ordered = sorted(values)
    return ordered[max(0, left_out - 1)], ordered[-max(1, left_out)]


def main(argv: list[str] | None = None) -> None:
    parser = build_parser(__doc__, "determinism")
    parser.add_argument("--model_size", default="124M", choices=SHAPES)
    parser.add_argument("--batch_size", type=int, default=2, help="sequences per step")
    parser.add_argument("--sequence_length", type=int, default=1024, help="tokens")
    parser.add_argument("--compile", default="on", choices=["on", "off"])
    parser.add_argument("--rounds", type=int, default=30, help="measured steps of each")
    options = parser.parse_args(argv)
    report = Report("determinism", options)

    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        seconds = measure(options)
    part = f"{options.model_size}, {options.batch_size} x {options.sequence_length} tokens, compile {options.compile}"
    for name, times in seconds.items():
        report.add_median(part, name, times, "s per step")
    ratios = [ours / theirs for ours, theirs in zip(*(seconds[name] for name in PEERS), strict=True)]
    low, high = find_median_interval(ratios)
    statistic = f"median of {len(ratios)} neighboring pairs, 95 % interval"
    report.add(part, " / ".join(PEERS), statistics.median(ratios), "x", statistic=statistic, low=low, high=high)
    report.write(options.output)


if __name__ == "__main__":
    main()
