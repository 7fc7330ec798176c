"""On a CPU the same command gives the same bits, compiled or not, and on a busy machine."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from conftest import REPOSITORY
from fork_server import CALL_MAIN, serve_forks
from small_corpora import write_small_data
from small_runs import flags, read_losses
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch._inductor.utils import run_and_get_code

from modeling_gpt2_repro import GPT2ReproConfig, GPT2ReproForCausalLM
from modeling_gpt2_repro.core import devices, launch
from modeling_gpt2_repro.training.batch_fit import WindowLoss, fit_micro_batch

pytestmark = pytest.mark.heavy

CPU = torch.device("cpu")
needs_compiler = pytest.mark.skipif(not devices.can_compile(CPU), reason="torch.compile needs a C++ compiler on a CPU")
needs_bf16 = pytest.mark.skipif(not devices.supports_bf16(CPU), reason="this CPU has no bf16 of its own")
precisions = pytest.mark.parametrize(
    "precision", [pytest.param("no", id="float32"), pytest.param("bf16", marks=needs_bf16, id="bf16")]
)

HALF = 10
SETTINGS = {
    **{"n_layer": 1, "tokens_per_step": 384, "learning_rate": 6e-3, "max_steps": 2 * HALF, "save_every": HALF},
    **{"eval_every": 0, "hellaswag_every": 0, "sample_every": 0},
}
N_REPETITIONS = 10

SCRIPT = f"""
import torch
from modeling_gpt2_repro.training import throughput
throughput.measure_peak_flops = lambda *arguments: 1e12  # takes a second and decides nothing
torch.set_num_threads({{n_threads}})
{CALL_MAIN}
"""


@pytest.fixture(scope="module")
def server():
    modules = ["train", "torch._inductor.compile_fx", "modeling_gpt2_repro.plots.drawer"]
    # With busy waiting, threads would take the cores from those that they wait for, which costs minutes.
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_WAIT_POLICY": "PASSIVE"}
    with serve_forks(modules, environment) as server:
        yield server


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Shards with a vocabulary so small that a run takes a second, and threads often add to the same rows."""
    return write_small_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def train(server, data, tmp_path):
    """Return a function that trains in separate processes and returns the run folder."""

    def train(run_name: str, n_processes: int, n_threads: int, **changes) -> Path:
        argv = flags(data, tmp_path, run_name, **SETTINGS | changes)
        script = SCRIPT.format(n_threads=n_threads)
        if n_processes == 1:
            result = server.run("train", argv, tmp_path, script=script)
        else:
            result = server.launch(n_processes, "train", argv, tmp_path, script)
        assert result.code == 0, result.err
        precision = "bf16" if changes.get("mixed_precision") == "bf16" else "float32"
        assert f"cpu, {n_threads} thread(s); {n_processes} process(es); {precision}\n" in result.out
        assert ("compiling the training step" in result.out) == (changes.get("compile") == "on")
        assert "torch.compile failed" not in result.out
        return tmp_path / run_name

    return train


@pytest.fixture
def busy_cores():
    """Keep all cores busy at a lower priority, so that threads and processes are interrupted at random."""
    script = "import os\nos.nice(5)\nparent = os.getppid()\nwhile os.getppid() == parent: pass"
    processes = [subprocess.Popen([sys.executable, "-c", script]) for _ in range(devices.count_cores())]
    yield
    for process in processes:
        process.kill()
        process.wait()


def hash_weights(run: Path) -> str:
    return hashlib.sha256((run / "final" / "model.safetensors").read_bytes()).hexdigest()


def assert_resumes_to_the_same_bits(train, whole: Path, *layout: int, **changes) -> None:
    """Assert that repeating the second half of a run gives the same losses and final weights."""
    checkpoint = Path("checkpoints") / f"step_{HALF:07d}"
    shutil.copytree(whole / checkpoint, whole.parent / "resumed" / checkpoint)
    resumed = train("resumed", *layout, **changes)
    assert list(read_losses(resumed).items()) == list(read_losses(whole).items())[HALF:]
    assert hash_weights(resumed) == hash_weights(whole)


@needs_compiler
def test_a_run_compiled_for_several_threads_resumes_with_the_same_bits_on_a_busy_machine(train, busy_cores):
    assert_resumes_to_the_same_bits(train, train("whole", 1, 2, compile="on"), 1, 2, compile="on")


def test_three_processes_resume_with_the_same_bits(train):
    """With two, the order of an addition would not matter."""
    assert_resumes_to_the_same_bits(train, train("whole", 3, 1), 3, 1)


@pytest.mark.slow
@precisions
@pytest.mark.parametrize(
    "compile", [pytest.param("on", marks=needs_compiler, id="compiled"), pytest.param("off", id="eager")]
)
@pytest.mark.parametrize(
    "layout",
    [
        pytest.param((1, 2), id="two threads"),
        pytest.param((1, 3), id="three threads"),
        pytest.param((2, 1), id="two processes"),
        pytest.param((3, 1), id="three processes"),
    ],
)
def test_a_run_repeated_on_a_busy_machine_has_the_same_bits_each_time(train, busy_cores, layout, compile, precision):
    changes = {"n_layer": 2, "n_embd": 64, "tokens_per_step": 768, "micro_batch_size": 4}
    changes |= {"compile": compile, "mixed_precision": precision}
    runs = [train(f"run_{repetition}", *layout, **changes) for repetition in range(N_REPETITIONS)]
    assert len({hash_weights(run) for run in runs}) == 1
    assert all(read_losses(run) == read_losses(runs[0]) for run in runs)
    assert_resumes_to_the_same_bits(train, runs[0], *layout, **changes)


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)
    launch.compute_deterministically(False)
    torch._dynamo.reset()


def compile_training_step(accelerator: Accelerator) -> str:
    """Return the code that a trial generates for the forward and the backward pass, without caches."""
    config = GPT2ReproConfig(
        n_layer=1, n_head=2, n_embd=16, vocab_size=64, n_positions=8, bos_token_id=None, eos_token_id=None
    )
    loss_model, windows = WindowLoss(GPT2ReproForCausalLM(config).train()), torch.randint(0, 64, (4, 9))
    with inductor_config.patch(fx_graph_cache=False), functorch_config.patch(enable_autograd_cache=False):
        _, codes = run_and_get_code(fit_micro_batch, loss_model, windows, [4], "on", accelerator, print)
    forward, backward = codes
    return forward + backward


@needs_compiler
@precisions
def test_compiled_threads_do_not_add_atomically(two_threads, precision):
    accelerator = launch.start_accelerator(precision)
    assert "atomic_add" not in compile_training_step(accelerator)
    launch.compute_deterministically(False)
    assert "atomic_add" in compile_training_step(accelerator)  # otherwise the line above would prove nothing
