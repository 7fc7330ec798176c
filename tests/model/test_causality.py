"""Detecting whether a model is causal: its outputs for a token must not depend on later tokens."""

import pytest
import torch
from tiny_architectures import build_config
from tiny_models import build_model
from transformers import AutoModelForCausalLM, GPT2LMHeadModel
from transformers.modeling_outputs import CausalLMOutput

from modeling_gpt2_repro.core.errors import UserError
from modeling_gpt2_repro.model.causality import check_causal, looks_ahead

CAUSAL = ["gpt2", "gpt_neo", "gpt_neox", "gptj", "gpt_bigcode", "openai-gpt", "ctrl", "opt", "bloom", "mpt", "xglm"]
CAUSAL += ["llama", "mistral", "gemma2", "gemma3_text", "qwen2", "qwen3", "phi", "phi3", "olmo2", "cohere", "stablelm"]
CAUSAL += ["mixtral", "qwen2_moe", "granitemoe", "gpt_oss"]  # the order of their experts' sums depends on all tokens
CAUSAL += ["mamba", "rwkv", "recurrent_gemma", "qwen3_next"]  # recurrent
CAUSAL += ["bart", "biogpt", "modernbert-decoder"]
BIDIRECTIONAL = ["bert", "roberta", "xlm-roberta", "camembert", "electra", "big_bird", "roformer", "megatron-bert"]
BIDIRECTIONAL += ["xlnet", "xlm", "rembert", "ernie", "roc_bert"]


def build(model_type, **changes):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(build_config(model_type, **changes)).eval()


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16])
@pytest.mark.parametrize("model_type", CAUSAL)
def test_causal_models_are_recognized_in_any_precision(model_type, dtype):
    check_causal(build(model_type).to(dtype), "x")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", BIDIRECTIONAL)
def test_models_that_look_ahead_are_rejected_in_any_precision(model_type, dtype):
    """Test fresh models, whose attention is nearly uniform; XLNet does not run in bfloat16."""
    with pytest.raises(UserError, match=r"is not causal|forward pass fails"):
        check_causal(build(model_type).to(dtype), "x")


def test_an_encoder_configured_as_a_decoder_is_causal():
    for model_type in ("bert", "roberta", "electra", "roformer"):
        assert not looks_ahead(build(model_type, is_decoder=True))


@pytest.mark.parametrize("n_positions", [1, 2, 3, 7])
def test_models_with_few_positions_can_be_checked(n_positions):
    assert not looks_ahead(build_model(n_positions=n_positions, vocab_size=3))
    # RoBERTa's positions begin after the padding's.
    is_readable = n_positions > 2
    assert looks_ahead(build("roberta", max_position_embeddings=n_positions + 2, vocab_size=5)) or not is_readable


def test_our_own_model_is_causal_and_unchanged_by_the_check():
    model = build_model()
    model.train()
    before = torch.get_rng_state()
    assert not looks_ahead(model)
    assert model.training and torch.equal(torch.get_rng_state(), before)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


class Windowed(GPT2LMHeadModel):
    """Looks one token ahead, and is causal otherwise."""

    def forward(self, *args, **kwargs):
        logits = super().forward(*args, **kwargs).logits
        return CausalLMOutput(logits=logits + logits.roll(-1, dims=1))


class Detached(GPT2LMHeadModel):
    """A model without gradients, as with some kernels for quantized weights."""

    def forward(self, *args, **kwargs):
        with torch.no_grad():
            return super().forward(*args, **kwargs)


class DetachedWindowed(Windowed):
    def forward(self, *args, **kwargs):
        with torch.no_grad():
            return super().forward(*args, **kwargs)


@pytest.mark.parametrize("kind, expected", [(Windowed, True), (Detached, False), (DetachedWindowed, True)])
def test_looking_ahead_is_detected_without_the_config(kind, expected):
    assert looks_ahead(kind(build_config("gpt2")).eval()) is expected
