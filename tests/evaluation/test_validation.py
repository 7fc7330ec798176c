"""The validation loss."""

import math

import pytest
import torch
from accelerate import Accelerator
from tiny_models import build_pair, draw_ids, silence_blocks
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from modeling_gpt2_repro import GPT2ReproConfig, GPT2ReproForCausalLM
from modeling_gpt2_repro.evaluation.validation import evaluate_loss

N_BYTES = 123


@pytest.fixture
def model() -> GPT2ReproForCausalLM:
    torch.manual_seed(0)
    return GPT2ReproForCausalLM(
        GPT2ReproConfig(n_layer=1, n_head=2, n_embd=16, vocab_size=64, n_positions=8, resid_pdrop=0.5)
    )


@pytest.fixture
def windows() -> torch.Tensor:
    return torch.randint(0, 64, (11, 9), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_loss_is_the_mean_over_the_first_windows(model, windows, batch_size):
    model.train()
    random_state = torch.get_rng_state()
    result = evaluate_loss(model, list(windows), 7, batch_size=batch_size, n_bytes=N_BYTES, accelerator=Accelerator())
    assert model.training and torch.equal(torch.get_rng_state(), random_state)

    with torch.no_grad():
        logits = model.eval()(windows[:7, :-1]).logits
    targets = windows[:7, 1:]
    nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
    assert result.n_tokens == 7 * 8
    assert result.loss == pytest.approx(nats / (7 * 8), rel=1e-6)
    assert result.bpb == pytest.approx(nats / math.log(2) / N_BYTES, rel=1e-6)


def test_models_that_can_return_the_loss_alone_compute_no_logits(model, windows):
    outputs = []
    model.register_forward_hook(lambda _, arguments, output: outputs.append(output))
    evaluate_loss(model, list(windows), 7, batch_size=4, n_bytes=N_BYTES, accelerator=Accelerator())
    assert [output.logits for output in outputs] == [None, None]


def test_more_windows_than_available_means_all(model, windows):
    result = evaluate_loss(model, list(windows), 10**6, batch_size=4, n_bytes=N_BYTES, accelerator=Accelerator())
    assert result.n_tokens == 11 * 8


@pytest.mark.parametrize(
    "build",
    [
        lambda: GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=64, n_positions=9)),
        lambda: LlamaForCausalLM(
            LlamaConfig(
                vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
            )
        ),
    ],
    ids=["gpt2", "llama"],
)
def test_transformers_models_get_the_loss_that_they_compute(windows, build):
    torch.manual_seed(0)
    model = build()
    result = evaluate_loss(model, list(windows), 11, batch_size=4, n_bytes=N_BYTES, accelerator=Accelerator())
    assert model.training
    with torch.no_grad():
        expected = model.eval()(input_ids=windows, labels=windows).loss.item()
    assert result.loss == pytest.approx(expected, rel=1e-6)


def shift_logits(model: GPT2LMHeadModel | GPT2ReproForCausalLM, shift: float) -> None:
    """Add an offset to all logits, as OpenAI's weights have one, and leave the head as the only source of error."""
    silence_blocks(model)
    with torch.no_grad():
        direction = model.transformer.ln_f.bias.normal_(std=2, generator=torch.Generator().manual_seed(0))
        model.transformer.wte.weight += shift * direction / direction.square().sum()


@pytest.mark.parametrize("is_ours", [True, False], ids=["ours", "stock"])
def test_logits_near_minus_100_match_the_float64_loss_under_bf16(is_ours):
    model = build_pair()[0 if is_ours else 1]
    shift_logits(model, -200.0)  # the layer norm halves it
    windows = draw_ids(batch=24, length=49)
    result = evaluate_loss(
        model,
        list(windows),
        24,
        batch_size=8,
        n_bytes=N_BYTES,
        accelerator=Accelerator(mixed_precision="bf16"),
    )
    with torch.no_grad():
        logits = model.double()(windows[:, :-1]).logits
    assert -120 < logits.mean() < -80
    exact = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).item()
    assert result.loss == pytest.approx(exact, abs=1e-4)
