"""Runs as real processes on the device: resumed, stopped by a signal, and distributed, with the same results."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY
from safetensors.torch import load_file
from small_runs import flags, read_losses

from gpu.conftest import Scale
from modeling_gpt2_repro.training.preemption import PREEMPTED_EXIT_CODE

SECONDS = 240
N_DISTRIBUTED_UPDATES = 12


def list_flags(scale: Scale, corpus: Path, folder: Path, run_name: str, **changes) -> list[str]:
    """Return the flags of a reproducible run whose updates do not depend on its length."""
    settings = {
        **scale.settings,
        **{"eval_every": 0, "hellaswag_every": 0, "sample_every": 0, "save_every": 0},
        **{"deterministic": True, "lr_schedule": "constant", "max_steps": scale.n_updates},
    }
    return flags(corpus, folder, run_name, **settings | changes)


def build_environment(scale: Scale) -> dict[str, str]:
    """Return this process's environment without the variables that force tests onto the CPU."""
    forced = ("ACCELERATE_USE_CPU", "OMP_NUM_THREADS") if scale.is_cuda else ()
    environment = {name: value for name, value in os.environ.items() if name not in forced}
    return environment | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])}


def start(scale: Scale, command: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *command],
        env=build_environment(scale),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen, exit_code: int = 0) -> str:
    """Wait for a process, check its exit code, and return its output."""
    try:
        output, _ = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
    assert process.returncode == exit_code, output
    assert "torch.compile failed" not in output and "torch.compile is off" not in output
    return output


def run_training(scale: Scale, argv: list[str]) -> str:
    return finish(start(scale, [str(REPOSITORY / "train.py"), *argv]))


def read_state(checkpoint: Path) -> dict:
    return json.loads((checkpoint / "training_state" / "state.json").read_text())


def assert_same_end(run: Path, expected: Path) -> None:
    """Assert that two runs have the same losses at all common updates, and the same weights, bit for bit."""
    losses, others = read_losses(run), read_losses(expected)
    assert losses and all(others[step] == loss for step, loss in losses.items())
    weights, other_weights = (load_file(folder / "final" / "model.safetensors") for folder in (run, expected))
    assert weights.keys() == other_weights.keys()
    assert all(torch.equal(weights[name], other_weights[name]) for name in other_weights)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def whole_run(scale, corpus, runs) -> Path:
    """An undisturbed run with a checkpoint half-way."""
    output = run_training(scale, list_flags(scale, corpus, runs, "whole", save_every=scale.n_updates // 2))
    assert f"x 4 micro-step(s) x {scale.micro_batch_size} sequence(s)" in output
    return runs / "whole"


def test_a_resumed_run_keeps_its_micro_batch_and_ends_with_the_same_bits(scale, corpus, runs, whole_run):
    half = scale.n_updates // 2
    checkpoint = whole_run / "checkpoints" / f"step_{half:07d}"
    (runs / "resumed" / "checkpoints").mkdir(parents=True)
    shutil.copytree(checkpoint, runs / "resumed" / "checkpoints" / checkpoint.name)
    changes = {"micro_batch_size": "auto", "save_every": scale.n_updates}
    output = run_training(scale, list_flags(scale, corpus, runs, "resumed", **changes))
    # A new run with `auto` would take a whole update at once.
    assert f"from step {half:,}" in output
    assert f"x 4 micro-step(s) x {scale.micro_batch_size} sequence(s)" in output
    assert list(read_losses(runs / "resumed")) == list(range(half + 1, scale.n_updates + 1))
    assert_same_end(runs / "resumed", whole_run)
    device = torch.cuda.get_device_name() if scale.is_cuda else "cpu"
    for folder in (checkpoint, runs / "resumed" / "checkpoints" / f"step_{scale.n_updates:07d}"):
        state = read_state(folder)
        assert (state["micro_batch_size"], state["hardware"]) == (scale.micro_batch_size, f"1 x {device}")


def test_a_run_stopped_by_sigterm_resumes_to_the_same_bits(scale, corpus, runs, whole_run):
    argv, run = list_flags(scale, corpus, runs, "stopped"), runs / "stopped"
    process = start(scale, [str(REPOSITORY / "train.py"), *argv])
    wait_for_update(process, run, 3)
    process.send_signal(signal.SIGTERM)
    finish(process, PREEMPTED_EXIT_CODE)
    status = json.loads((run / "status.json").read_text())
    step = status["step"]
    assert status["status"] == "preempted" and 3 <= step < scale.n_updates
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step_{step:07d}"]
    assert f"from step {step:,}" in run_training(scale, argv)
    assert list(read_losses(run)) == list(range(1, scale.n_updates + 1))
    assert_same_end(run, whole_run)


def wait_for_update(process: subprocess.Popen, run: Path, update: int) -> None:
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        if (run / "metrics.jsonl").exists() and f'"step": {update}' in (run / "metrics.jsonl").read_text():
            return
        time.sleep(0.02)
    process.kill()
    raise AssertionError(f"no update {update}: {process.communicate()[0]}")


# accelerate distributes only from two processes on, but one is enough to test NCCL, the wrapper and the compiler
# together.
DISTRIBUTED = """
import sys
import torch
from torch.nn.parallel import DistributedDataParallel
import train

def train_distributed(run, *arguments):
    if not isinstance(run.loss_model, DistributedDataParallel):
        run.loss_model = DistributedDataParallel(run.loss_model)
        run.accelerator.no_sync = lambda model: model.no_sync()
    wrapped = type(run.loss_model.module).__name__
    print("distributed:", torch.distributed.get_backend(), type(run.loss_model).__name__, wrapped, flush=True)
    return train_alone(run, *arguments)

train_alone, train.train = train.train, train_distributed
sys.exit(train.main(sys.argv[1:]))
"""


def test_a_distributed_run_has_the_losses_of_a_single_process(scale, corpus, runs, whole_run, tmp_path):
    (tmp_path / "distributed.py").write_text(DISTRIBUTED)
    argv = list_flags(scale, corpus, runs, "distributed", max_steps=N_DISTRIBUTED_UPDATES)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    output = finish(start(scale, [*launcher, str(tmp_path / "distributed.py"), *argv]))
    backend = "nccl" if scale.is_cuda else "gloo"
    assert f"distributed: {backend} DistributedDataParallel OptimizedModule" in output
    losses, expected = read_losses(runs / "distributed"), read_losses(whole_run)
    assert list(losses) == list(range(1, N_DISTRIBUTED_UPDATES + 1))
    assert losses[N_DISTRIBUTED_UPDATES] < losses[1]
    assert losses == pytest.approx({step: expected[step] for step in losses}, abs=1e-4)
