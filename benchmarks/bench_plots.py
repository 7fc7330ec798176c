"""What the curves of a long run cost: the time to draw them, and how long training waits for them.

    python benchmarks/bench_plots.py [--steps 20000] [--rounds 7] [--threads 1]

First the whole command, and reading and drawing alone, on a run folder of so many steps with everything that train.py
records. Then a training loop on the CPU, in one thread unless --threads says more: a hundred steps without a picture,
with one asked for in the background in their midst, and with one drawn in their midst. The three take turns.
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench_tracking import STEP_METRICS

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
    """Write the files of a run whose numbers are noise around a falling line."""
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


def time_call(call: Callable[[], object]) -> float:
    """Return the seconds of one call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def build_step() -> Callable[[], None]:
    """Build an update of a small model, of tens of milliseconds."""
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
    """Return the seconds of each step of a loop; what `draw` takes counts to the one that it comes before."""
    return np.array([time_call(lambda: (n == LOOP_STEPS // 2 and draw(), step())) for n in range(LOOP_STEPS)])  # noqa: B023


def wait_for_picture(folder: RunFolder) -> None:
    """Return when the background has drawn."""
    while not folder.curves.exists():
        time.sleep(0.1)
    folder.curves.unlink()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = RunFolder(Path(scratch) / "run")
        write_run(folder, arguments.steps)
        size = folder.metrics.stat().st_size / 1e6
        print(f"a run of {arguments.steps:,} steps, {size:.1f} MB of metrics")
        command = [sys.executable, "-m", "modeling_gpt2_repro", "plots", str(folder)]
        environment = {**os.environ, "PYTHONPATH": sys.path[0]}
        run = functools.partial(subprocess.run, command, check=True, env=environment, stdout=subprocess.DEVNULL)
        calls = {"the whole command": run, "reading and drawing": functools.partial(draw_curves, folder)}
        for name, call in calls.items():
            seconds = [time_call(call) for _ in range(arguments.rounds)]
            print(f"{name:<20} {statistics.median(seconds):.2f} s (median of {arguments.rounds})")

        torch.set_num_threads(arguments.threads)
        step = build_step()
        requests, loops = [], {"no picture": [], "in the background": [], "in the loop": []}
        with CurveDrawer(folder, print) as curves:
            folder.curves.unlink()
            print(f"first request        {1000 * time_call(curves.request):.1f} ms")
            wait_for_picture(folder)
            for _ in range(arguments.rounds):
                loops["no picture"].append(time_steps(step, lambda: None))
                loops["in the background"].append(time_steps(step, lambda: requests.append(time_call(curves.request))))
                wait_for_picture(folder)
                loops["in the loop"].append(time_steps(step, lambda: draw_curves(folder)))
                folder.curves.unlink()
        print(f"later requests       {1000 * statistics.median(requests):.3f} ms")
    print(f"{LOOP_STEPS} steps, medians of {arguments.rounds}:")
    for name, times in loops.items():
        sums, slowest = ([getattr(loop, what)() for loop in times] for what in ("sum", "max"))
        print(f"  {name:<18} {statistics.median(sums):.2f} s, the slowest step {statistics.median(slowest):.3f} s")


if __name__ == "__main__":
    main()
