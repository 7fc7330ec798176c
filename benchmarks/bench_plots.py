"""The cost of a long run's curves: the time to draw them, and how long training waits for them.

    python benchmarks/bench_plots.py [--steps 20000] [--rounds 7] [--threads 1]

First the command `plots`, and reading and drawing alone, on a run folder of --steps steps with train.py's metrics.
Then a hundred training steps on the CPU, in --threads threads: without a picture, with one requested in the background
half-way, and with one drawn in the loop half-way. The three take turns.
"""

import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.bench_tracking import STEP_METRICS
from benchmarks.measurements import ROOT, Report, build_parser, time_call
from modeling_gpt2_repro import GPT2ReproConfig, GPT2ReproForCausalLM
from modeling_gpt2_repro.core.arguments import write_config
from modeling_gpt2_repro.plots.drawer import CurveDrawer
from modeling_gpt2_repro.plots.run_figure import draw_curves
from modeling_gpt2_repro.training.config import TrainingConfig
from modeling_gpt2_repro.training.run_folder import RunFolder

EVALUATION_METRICS = ("val/loss", "val/bpb", "hellaswag/acc_norm", "hellaswag/acc")
VOCABULARY = {"vocab_size": 4096, "bos_token_id": 0, "eos_token_id": 0}
EVAL_EVERY, LOOP_STEPS = 250, 100


def write_run(folder: RunFolder, n_steps: int) -> None:
    """Write the files of a run whose metrics are noise around a falling line."""
    generator = np.random.default_rng(0)
    folder.path.mkdir()
    write_config(TrainingConfig(run_name=folder.path.name), folder.config)
    with open(folder.metrics, "w", encoding="utf-8") as stream:
        for step in range(n_steps + 1):
            names = STEP_METRICS if step else ()
            values = 3 + 8 * np.exp(-step / 300) + generator.normal(0, 0.06, len(STEP_METRICS))
            stream.write(json.dumps({"step": step, **dict(zip(names, values.tolist(), strict=False))}) + "\n")
            if step % EVAL_EVERY == 0:
                stream.write(json.dumps({"step": step, **dict.fromkeys(EVALUATION_METRICS, float(values[0]))}) + "\n")


def build_step() -> Callable[[], None]:
    """Build an update of a small model, which takes about ten milliseconds."""
    torch.manual_seed(0)
    model = GPT2ReproForCausalLM(GPT2ReproConfig(n_layer=2, n_head=2, n_embd=64, n_positions=64, **VOCABULARY))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    windows = torch.randint(0, 4096, (4, 65))

    def step() -> None:
        model(input_ids=windows[:, :-1], shift_labels=windows[:, 1:]).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def time_steps(step: Callable[[], None], draw: Callable[[], object]) -> np.ndarray:
    """Return the seconds of each step of a loop; `draw` is called, and timed, with the middle one."""
    return np.array([time_call(lambda: (n == LOOP_STEPS // 2 and draw(), step())) for n in range(LOOP_STEPS)])  # noqa: B023


def wait_for_picture(folder: RunFolder) -> None:
    """Wait until the background process has drawn, and delete the picture."""
    while not folder.curves.exists():
        time.sleep(0.1)
    folder.curves.unlink()


def measure_drawing(report: Report, folder: RunFolder, rounds: int) -> None:
    """Measure the command `plots`, and reading and drawing alone."""
    command = [sys.executable, "-m", "modeling_gpt2_repro", "plots", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = functools.partial(subprocess.run, command, check=True, env=environment, stdout=subprocess.DEVNULL)
    part = f"curves of {report.settings['steps']:,} steps"
    report.add(part, "metrics.jsonl", folder.metrics.stat().st_size / 1e6, "MB")
    calls = {"command `plots`, imports included": run, "reading and drawing": functools.partial(draw_curves, folder)}
    for name, call in calls.items():
        report.add_median(part, name, [time_call(call) for _ in range(rounds)], "s")


def measure_waits(report: Report, folder: RunFolder, rounds: int) -> None:
    """Measure what a training loop waits for a picture that is drawn in the background, or in the loop."""
    step = build_step()
    requests, loops = [], {"no picture": [], "picture in the background": [], "picture in the loop": []}
    with CurveDrawer(folder, print) as curves:
        folder.curves.unlink()
        part = "requesting a picture"
        report.add(
            part,
            "first request, which starts the process",
            1000 * time_call(curves.request),
            "ms",
            statistic="single run",
        )
        wait_for_picture(folder)
        for _ in range(rounds):
            loops["no picture"].append(time_steps(step, lambda: None))
            in_background = time_steps(step, lambda: requests.append(1000 * time_call(curves.request)))
            loops["picture in the background"].append(in_background)
            wait_for_picture(folder)
            loops["picture in the loop"].append(time_steps(step, lambda: draw_curves(folder)))
            folder.curves.unlink()
    report.add_median(part, "later requests", requests, "ms")
    part = f"{LOOP_STEPS} training steps on the CPU"
    for name, times in loops.items():
        report.add_median(part, name, [1000 * loop.max() for loop in times], "ms for the slowest step")
        report.add_median(part, name, [loop.sum() for loop in times], "s in all")
    for name in loops:
        report.compare(part, name, *({"no picture"} - {name}))


def main(argv: list[str] | None = None) -> None:
    parser = build_parser(__doc__, "plots")
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(argv)
    report = Report("plots", options)
    with tempfile.TemporaryDirectory() as scratch:
        folder = RunFolder(Path(scratch) / "run")
        write_run(folder, options.steps)
        measure_drawing(report, folder, options.rounds)
        torch.set_num_threads(options.threads)
        measure_waits(report, folder, options.rounds)
    report.write(options.output)


if __name__ == "__main__":
    main()
