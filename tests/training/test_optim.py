"""The optimizer."""

import torch

from modeling_gpt2_repro import GPT2ReproConfig, GPT2ReproForCausalLM
from modeling_gpt2_repro.training.optim import build_adamw, set_learning_rate


def test_only_matrices_and_embeddings_decay():
    model = GPT2ReproForCausalLM(GPT2ReproConfig(n_layer=2, n_head=2, n_embd=16, vocab_size=64, n_positions=8))
    optimizer = build_adamw(model, 1e-3, 0.1, (0.9, 0.95))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decay) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        is_decayed = name.endswith("weight") and "ln_" not in name
        assert decay[id(parameter)] == (0.1 if is_decayed else 0.0), name


def test_learning_rate_reaches_every_group():
    optimizer = build_adamw(torch.nn.Linear(2, 2), 1e-3, 0.1, (0.9, 0.95))
    set_learning_rate(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]
