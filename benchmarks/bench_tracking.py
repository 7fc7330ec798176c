"""How long a step waits for its metrics to be logged: to the run's files alone, and with each tracker.

    python benchmarks/bench_tracking.py [--steps 1000]

Nothing is trained: a step's metrics are logged, then two milliseconds pass. wandb runs offline.
"""

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from accelerate import Accelerator

from benchmarks.measurements import Report, build_parser
from modeling_gpt2_repro.training.config import TRACKERS, TrainingConfig
from modeling_gpt2_repro.training.record import RunRecord
from modeling_gpt2_repro.training.run_folder import RunFolder
from modeling_gpt2_repro.training.trackers import choose_trackers

STEP_METRICS = (
    "train/loss",
    "train/lr",
    "train/grad_norm",
    "train/tokens_per_second",
    "train/mfu",
    "train/data_wait_seconds",
    "train/tokens",
    "train/epoch",
    "train/flops",
    "train/elapsed_seconds",
    "train/peak_memory_gb",
)
PAUSE_SECONDS = 0.002


def time_records(folder: Path, report_to: str, n_steps: int) -> list[float]:
    """Return the milliseconds that logging each step takes."""
    record = RunRecord(RunFolder(folder), Accelerator(), print, choose_trackers(report_to))
    record.start(TrainingConfig(report_to=report_to), None)
    times = []
    for step in range(1, n_steps + 1):
        metrics = dict.fromkeys(STEP_METRICS, 1 / step)
        started = time.perf_counter()
        record.log(step, metrics)
        times.append(1000 * (time.perf_counter() - started))
        time.sleep(PAUSE_SECONDS)
    record.close()
    return times


def main(argv: list[str] | None = None) -> None:
    parser = build_parser(__doc__, "tracking")
    parser.add_argument("--steps", type=int, default=1000)
    options = parser.parse_args(argv)
    report, part = Report("tracking", options), f"logging one step's {len(STEP_METRICS)} metrics"
    with tempfile.TemporaryDirectory() as scratch:
        for report_to in ("none", *TRACKERS):
            times = sorted(time_records(Path(scratch) / report_to, report_to, options.steps))
            name = "metrics.jsonl alone" if report_to == "none" else f"with {report_to}"
            report.add(part, name, statistics.median(times), "ms", statistic=f"median of {len(times)}")
            report.add(part, name, times[int(0.99 * len(times))], "ms, 99th percentile")
    report.write(options.output)


if __name__ == "__main__":
    main()
