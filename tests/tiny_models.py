"""Random models of this package and of transformers, small enough to build in every test."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from modeling_gpt2_repro import GPT2ReproConfig, GPT2ReproForCausalLM

SHAPE = {"vocab_size": 301, "n_positions": 48, "n_embd": 48, "n_layer": 3, "n_head": 4}
NO_SPECIAL_TOKENS = {"bos_token_id": None, "eos_token_id": None}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def build_model(seed: int = 0, **changes) -> GPT2ReproForCausalLM:
    """Build a model whose weights depend on the seed alone, and in which every weight affects the logits.

    A freshly initialized model hides mix-ups: its biases are 0, its norms 1, and its attention nearly uniform.
    """
    model = GPT2ReproForCausalLM(GPT2ReproConfig(**{**SHAPE, **NO_SPECIAL_TOKENS, **changes}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_scale = "ln_" in name and name.endswith("weight")
            std = 0.3 if name.endswith("c_attn.weight") else 0.15
            parameter.copy_(is_scale + std * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def build_stock_model(**changes) -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(**{**SHAPE, **NO_DROPOUT, **NO_SPECIAL_TOKENS, **changes})).eval()


def build_pair(**changes) -> tuple[GPT2ReproForCausalLM, GPT2LMHeadModel]:
    """Build a `GPT2ReproForCausalLM` and transformers' own GPT-2 with the same weights."""
    model, stock = build_model(**changes), build_stock_model(**changes)
    stock.load_state_dict(model.state_dict(), strict=True)
    return model, stock


def silence_blocks(model: GPT2ReproForCausalLM | GPT2LMHeadModel) -> None:
    """Let the blocks add nothing to the residual stream; only embeddings, final layer norm and head remain."""
    with torch.no_grad():
        for block in model.transformer.h:
            for projection in (block.attn.c_proj, block.mlp.c_proj):
                projection.weight.zero_()
                projection.bias.zero_()


def draw_ids(batch: int = 2, length: int = 33, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, SHAPE["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(seed))


def assert_close(actual: torch.Tensor, expected: torch.Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)
