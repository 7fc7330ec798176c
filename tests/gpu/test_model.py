"""Loss and gradients of the whole model: against the CPU's, compiled, and with recomputed activations."""

import copy
from dataclasses import dataclass

import pytest
import torch

from gpu.conftest import Scale
from gpu.drawn_models import assert_gradients_close, compute_gradients, draw_model, draw_windows
from modeling_gpt2_repro.training.batch_fit import WindowLoss

N_LAYERS = 4


def test_float32_on_the_device_matches_float32_on_the_cpu(scale, exact_float32):
    """On the device with fused attention and a chunked loss; on the CPU with attention and logits written out."""
    model = draw_model({**scale.shape, "n_layer": N_LAYERS}, scale.sequence_length)
    on_device = WindowLoss(copy.deepcopy(model)).to(scale.device)
    on_device.model.loss_chunk_tokens = 100
    windows = draw_windows(2, scale.sequence_length // 2, seed=1)

    class PlainLoss(WindowLoss):
        def forward(self, windows: torch.Tensor) -> torch.Tensor:
            return self.model(windows, labels=windows, use_cache=False).loss

    model.set_attn_implementation("eager")
    expected_loss, expected = compute_gradients(PlainLoss(model), windows[:, :-1])
    loss, gradients = compute_gradients(on_device, windows[:, :-1].to(scale.device))
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert_gradients_close(gradients, expected, whole=1e-4, each=1e-4)


@dataclass
class Measured:
    """The loss on the same windows, its gradients, and its peak memory in bytes."""

    loss: float
    gradients: dict[str, torch.Tensor]
    peak_bytes: int


@pytest.fixture(scope="module")
def measured(scale) -> dict[str, Measured]:
    """One model in bf16, eager and compiled, with stored and with recomputed activations."""
    found = {}
    for name in ("eager", "compiled", "eager, recomputed", "compiled, recomputed"):
        model = draw_model({**scale.shape, "n_layer": N_LAYERS}, scale.sequence_length).to(scale.device)
        model.loss_chunk_tokens = 1024  # otherwise the logits would take most of the memory
        if "recomputed" in name:
            enable_checkpointing(model)
        loss_model = WindowLoss(model)
        torch._dynamo.reset()
        if "compiled" in name:
            loss_model = torch.compile(loss_model, dynamic=False, fullgraph=True)
        found[name] = measure(loss_model, scale)
    return found


def enable_checkpointing(model) -> None:
    """Recompute activations, with the class that the installed transformers has for it."""
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()


def measure(loss_model: torch.nn.Module, scale: Scale) -> Measured:
    windows = draw_windows(4 * scale.micro_batch_size, scale.sequence_length, seed=2).to(scale.device)
    compute_gradients(loss_model, windows, torch.bfloat16)  # compiles
    if scale.is_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    loss, gradients = compute_gradients(loss_model, windows, torch.bfloat16)
    return Measured(loss, gradients, torch.cuda.max_memory_allocated() - before if scale.is_cuda else 0)


def test_the_compiled_step_matches_the_eager_one(measured):
    eager, compiled = measured["eager"], measured["compiled"]
    assert compiled.loss == pytest.approx(eager.loss, abs=1e-2)
    assert_gradients_close(compiled.gradients, eager.gradients, whole=2e-2, each=5e-2)


@pytest.mark.parametrize("way", ["eager", "compiled"])
def test_recomputed_activations_give_the_same_gradients(measured, way):
    kept, recomputed = measured[way], measured[f"{way}, recomputed"]
    assert recomputed.loss == pytest.approx(kept.loss, abs=1e-3)
    assert_gradients_close(recomputed.gradients, kept.gradients, whole=1e-2, each=3e-2)


@pytest.mark.parametrize("way", ["eager", "compiled"])
def test_recomputed_activations_need_less_memory(scale, measured, way):
    if not scale.is_cuda:
        pytest.skip("torch does not count a CPU's memory")
    # Of the activations of four layers (36.6 bytes per token and unit of width each), those of one layer remain,
    # besides the layers' inputs.
    assert measured[f"{way}, recomputed"].peak_bytes < 0.8 * measured[way].peak_bytes
