"""The trial before the first step: compiling, falling back to eager, and finding the size that fits in memory."""

import shutil
import weakref

import pytest
import torch
from accelerate import Accelerator
from torch._dynamo.utils import counters

from modeling_gpt2_repro import GPT2ReproConfig, GPT2ReproForCausalLM
from modeling_gpt2_repro.core.errors import UserError
from modeling_gpt2_repro.training import batch_fit
from modeling_gpt2_repro.training.batch_fit import WindowLoss, fit_micro_batch

pytestmark = pytest.mark.heavy


@pytest.fixture
def model() -> GPT2ReproForCausalLM:
    torch.manual_seed(0)
    config = GPT2ReproConfig(n_layer=1, n_head=2, n_embd=16, vocab_size=64, n_positions=9)
    return GPT2ReproForCausalLM(config).train()


@pytest.fixture
def windows() -> torch.Tensor:
    return torch.randint(0, 64, (4, 9), generator=torch.Generator().manual_seed(0))


def fit(loss_model, windows, sizes, compile="off"):
    said = []
    return fit_micro_batch(loss_model, windows, sizes, compile, Accelerator(), said.append), said


def test_the_loss_is_that_of_the_windows_targets(model, windows):
    expected = model.eval()(windows, labels=windows).loss
    torch.testing.assert_close(WindowLoss(model.train())(windows), expected)


def test_a_trial_leaves_weights_gradients_and_random_state_unchanged(model, windows):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_state = torch.get_rng_state()
    found, _ = fit(WindowLoss(model), windows, [4, 2, 1])
    assert isinstance(found.loss_model, WindowLoss) and found.micro_batch_size == 4 and found.seconds_per_token > 0
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)


class SmallMemory(WindowLoss):
    """A model on a device with memory for two windows."""

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        if len(windows) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return super().forward(windows)


def test_the_micro_batch_is_the_largest_that_fits(model, windows):
    assert fit(SmallMemory(model), windows, [4, 2, 1])[0].micro_batch_size == 2
    with pytest.raises(UserError, match=r"even 4 sequence\(s\) per micro-step do not fit"):
        fit(SmallMemory(model), windows, [8, 4])


def test_an_attempt_that_did_not_fit_frees_its_memory(model, windows):
    alive = []

    class RunsOutInBackward(WindowLoss):
        def forward(self, windows: torch.Tensor) -> torch.Tensor:
            alive.append([reference() is not None for reference in held])
            activations = torch.zeros(len(windows), requires_grad=True)
            held.append(weakref.ref(activations))
            loss = super().forward(windows) + activations.sum()
            if len(windows) > 1:
                loss.register_hook(run_out)
            return loss

    def run_out(gradient):
        raise torch.OutOfMemoryError("out of memory")

    held = []
    assert fit(RunsOutInBackward(model), windows, [4, 2, 1])[0].micro_batch_size == 1
    assert not any(any(each) for each in alive[:3])  # one attempt each


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_a_compiled_step_has_the_gradients_of_the_eager_one(model, windows):
    found, said = fit(WindowLoss(model), windows, [4], compile="on")
    compiled = found.loss_model
    assert not any("failed" in line for line in said)
    assert type(compiled) is not WindowLoss
    gradients = []
    for loss_model in (WindowLoss(model), compiled):
        model.zero_grad()
        loss_model(windows).backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-4, msg=name)
    # The module inside is still eager: another shape compiles nothing.
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert model.eval()(windows[:1, :3]).logits.shape == (1, 3, 64)


def test_without_a_compiler_the_run_is_eager_and_says_so(model, windows, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    found, said = fit(WindowLoss(model), windows, [4], compile="auto")
    assert type(found.loss_model) is WindowLoss
    assert "torch.compile is off" in said[0]


@pytest.mark.skipif(shutil.which("g++") is None, reason="without a C++ compiler nothing is compiled on a CPU")
@pytest.mark.parametrize("fault", ["compiler", "cache"])
def test_a_failing_compiler_leaves_the_run_eager_unless_compilation_was_requested(
    model, windows, monkeypatch, tmp_path, fault
):
    torch._dynamo.reset()
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / ("file" if fault == "cache" else "folder")))
    # With inductor's own patch: `monkeypatch` would leave behind a setting that is an alias.
    compiler = {"cpp.cxx": ("no-such-compiler",)} if fault == "compiler" else {}
    with torch._inductor.config.patch(compiler | {"force_disable_caches": True}):
        found, said = fit(WindowLoss(model), windows, [4], compile="auto")
        with pytest.raises(UserError, match=r"^--compile on: torch\.compile (failed|is off): "):
            fit(WindowLoss(model), windows, [4], compile="on")
    assert type(found.loss_model) is WindowLoss
    assert any(line.startswith("falling back to eager mode: torch.compile ") for line in said)


def test_an_error_about_memory_contains_the_advice(model, windows):
    with pytest.raises(UserError, match=r"memory: use --micro_batch_size auto, --model_size 124M$"):
        fit_micro_batch(SmallMemory(model), windows, [4], "off", Accelerator(), print, "--model_size 124M")


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_each_size_that_is_tried_is_compiled_into_one_graph(model, windows, monkeypatch):
    torch._dynamo.reset()
    tried, time_micro_step = [], batch_fit._time_micro_step

    def run(loss_model, dataset, size, accelerator):
        tried.append(size)
        return time_micro_step(loss_model, dataset, size, accelerator)

    def run_out(gradient):  # at the end of a compiled backward pass, as on a real device
        if tried[-1] > 1:
            raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(batch_fit, "_time_micro_step", run)
    hook = model.transformer.wpe.weight.register_hook(run_out)
    counters["stats"].clear()
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        found, said = fit(WindowLoss(model), windows, [2, 1], compile="on")
    assert tried == [2, 1] and found.micro_batch_size == 1
    assert counters["stats"]["unique_graphs"] == len(tried)
    assert not any("failed" in line for line in said) and type(found.loss_model) is not WindowLoss
    hook.remove()
    with torch._dynamo.config.patch(error_on_recompile=True):
        found.loss_model(windows[:1]).backward()


FIT = """
import torch
from torch._inductor import config as inductor_config
if rank == 1:  # in the configuration, too: the environment may have been read before the fork
    os.environ |= {{"CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": {cache!r}}}
    inductor_config.cpp.cxx = ("no-such-compiler",)
from accelerate import Accelerator
from modeling_gpt2_repro import GPT2ReproConfig, GPT2ReproForCausalLM
from modeling_gpt2_repro.training.batch_fit import WindowLoss, fit_micro_batch
torch.manual_seed(0)
model = GPT2ReproForCausalLM(GPT2ReproConfig(n_layer=1, n_head=2, n_embd=16, vocab_size=64, n_positions=9)).train()
accelerator = Accelerator(cpu=True)
windows = torch.randint(0, 64, (4, 9))
class Fails(WindowLoss):
    def forward(self, windows):
        if rank == 1 and {runs_out} and len(windows) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return super().forward(windows)
say = lambda line: os.write(1, f"{{rank}}: {{line}}\\n".encode())  # unbuffered, or the lines of both would mix
try:
    fit = fit_micro_batch(Fails(model), windows, [4, 2, 1], {compile!r}, accelerator, say)
    say(f"answers {{type(fit.loss_model).__name__}} {{fit.micro_batch_size}}")
except ValueError as error:
    say(f"refuses: {{error}}")
"""


@pytest.fixture
def fit_in_two_processes(forks, tmp_path):
    def fit(compile, runs_out=False) -> list[str]:
        script = FIT.format(compile=compile, runs_out=runs_out, cache=str(tmp_path / "cache"))
        result = forks.launch(2, "train", [], tmp_path, script)
        assert result.code == 0, result.err
        return result.out.splitlines()

    return fit


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.parametrize("compile, reason", [("auto", "there is no compiler"), ("on", "torch.compile failed")])
def test_all_processes_compile_or_none_does_and_reports_why(fit_in_two_processes, compile, reason):
    lines = fit_in_two_processes(compile)
    answers = {f"{process}: answers Fails 4" for process in "01"}
    assert answers <= set(lines) if compile == "auto" else not answers & set(lines)
    consequence = "falling back to eager mode in all processes" if compile == "auto" else "refuses"
    for process in "01":
        (said,) = [line for line in lines if line.startswith(f"{process}: {consequence}")]
        assert "in process 1" in said and reason in said


def test_the_process_with_the_least_memory_decides_for_all(fit_in_two_processes):
    lines = fit_in_two_processes("off", runs_out=True)
    assert {"0: answers Fails 2", "1: answers Fails 2"} <= set(lines)
