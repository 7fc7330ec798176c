"""What a step waits for its record: the run's files alone, and with a tracker that is fed from them.

    python benchmarks/bench_tracking.py [--steps 1000]

Nothing is trained: the numbers of a step are recorded, and some milliseconds pass. wandb runs offline.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from accelerate import Accelerator

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
    """Return the milliseconds that each step's numbers take."""
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


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    n_steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as scratch:
        for report_to in ("none", *TRACKERS):
            times = sorted(time_records(Path(scratch) / report_to, report_to, n_steps))
            print(
                f"{report_to:<12} median {statistics.median(times):.2f} ms, 99 of 100 within "
                f"{times[int(0.99 * n_steps)]:.1f} ms",
                flush=True,
            )


if __name__ == "__main__":
    main()
