"""The trial before the first step: compiling, falling back, and finding what fits in memory."""

import shutil
import weakref

import pytest
import torch
from accelerate import Accelerator

from modeling_gpt2_repro import GPT2ReproConfig, GPT2ReproForCausalLM
from modeling_gpt2_repro.errors import UserError
from modeling_gpt2_repro.training.micro_step import WindowLoss, fit_micro_batch


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
    return *fit_micro_batch(loss_model, windows, sizes, compile, Accelerator(), said.append), said


def test_loss_is_that_of_the_windows_targets(model, windows):
    expected = model.eval()(windows, labels=windows).loss
    torch.testing.assert_close(WindowLoss(model.train())(windows), expected)


def test_trial_leaves_weights_gradients_and_rng_alone(model, windows):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_state = torch.get_rng_state()
    loss_model, size, seconds_per_token, _ = fit(WindowLoss(model), windows, [4, 2, 1])
    assert isinstance(loss_model, WindowLoss) and size == 4 and seconds_per_token > 0
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)


class SmallMemory(WindowLoss):
    """A model on a device that holds two windows."""

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        if len(windows) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return super().forward(windows)


def test_micro_batch_is_the_largest_that_fits(model, windows):
    assert fit(SmallMemory(model), windows, [4, 2, 1])[1] == 2
    with pytest.raises(UserError, match=r"even 4 sequence\(s\) at once do not fit"):
        fit(SmallMemory(model), windows, [8, 4])


def test_an_attempt_that_did_not_fit_leaves_nothing_behind(model, windows):
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
    assert fit(RunsOutInBackward(model), windows, [4, 2, 1])[1] == 1
    assert not any(any(each) for each in alive[:3])  # the first three are one attempt each


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_step_has_the_gradients_of_the_eager_one(model, windows):
    compiled, _, _, said = fit(WindowLoss(model), windows, [4], compile="on")
    assert not any("failed" in line for line in said)
    assert type(compiled) is not WindowLoss
    gradients = []
    for loss_model in (WindowLoss(model), compiled):
        model.zero_grad()
        loss_model(windows).backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-4, msg=name)
    # The plain module inside is still eager: another shape does not compile anything anew.
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert model.eval()(windows[:1, :3]).logits.shape == (1, 3, 64)


def test_without_a_compiler_the_run_is_eager_and_says_so(model, windows, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    loss_model, _, _, said = fit(WindowLoss(model), windows, [4], compile="auto")
    assert type(loss_model) is WindowLoss
    assert "torch.compile is off" in said[0]


def test_a_compiler_that_fails_leaves_the_run_eager(model, windows, monkeypatch, tmp_path):
    torch._dynamo.reset()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    # By inductor's own means: pytest's would leave a setting behind that is an alias.
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}):
        loss_model, _, _, said = fit(WindowLoss(model), windows, [4], compile="on")
    assert type(loss_model) is WindowLoss
    assert any("torch.compile failed" in line for line in said)
