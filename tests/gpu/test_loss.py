"""The head and its cross-entropy on the device, against a plain computation in float64."""

import contextlib

import pytest
import torch

from gpu.drawn_models import VOCAB_SIZE, relative_error
from modeling_gpt2_repro.modeling_gpt2_repro import HeadCrossEntropy

CHUNK_TOKENS = 128
# Unit roundoffs are 4e-3, 5e-4 and 6e-8; the relative error of a sum of products is smaller than that of its terms.
LARGEST_ERRORS = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}


def compute_loss(states: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return HeadCrossEntropy.apply(states, weight, targets, CHUNK_TOKENS) / (targets != -100).sum()


@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("precision", LARGEST_ERRORS, ids=str)
def test_loss_and_gradients_match_float64(scale, exact_float32, precision, is_compiled):
    generator = torch.Generator().manual_seed(3 * precision.itemsize + is_compiled)
    n_tokens, width = 3 * CHUNK_TOKENS // 2, scale.shape["n_embd"]  # the last chunk is short
    states = torch.randn(n_tokens, width, generator=generator)
    # Logits with a standard deviation of 3, so that some tokens are likely, as in a trained model.
    weight = 3 / width**0.5 * torch.randn(VOCAB_SIZE, width, generator=generator)
    targets = torch.randint(0, VOCAB_SIZE, (n_tokens,), generator=generator)
    is_ignored = torch.rand(n_tokens, generator=generator) < 0.1
    assert is_ignored.any()
    targets[is_ignored] = -100

    exact = [tensor.to(scale.device, torch.float64).requires_grad_() for tensor in (states, weight)]
    leaves = [tensor.to(scale.device).requires_grad_() for tensor in (states, weight)]
    targets = targets.to(scale.device)
    expected = torch.nn.functional.cross_entropy(exact[0] @ exact[1].t(), targets)
    expected.backward()

    torch._dynamo.reset()
    compute = torch.compile(compute_loss, fullgraph=True, dynamic=False) if is_compiled else compute_loss
    is_mixed = precision != torch.float32
    with torch.autocast(scale.device.type, precision) if is_mixed else contextlib.nullcontext():
        loss = compute(*leaves, targets)
    loss.backward()

    assert loss.dtype == torch.float32
    assert relative_error(loss, expected) < LARGEST_ERRORS[precision]
    for ours, theirs in zip(leaves, exact, strict=True):
        assert ours.grad.dtype == torch.float32
        assert relative_error(ours.grad, theirs.grad) < LARGEST_ERRORS[precision]
    assert not leaves[0].grad[is_ignored.to(scale.device)].any()
