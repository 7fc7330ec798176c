"""The calculated memory of a training step on a GPU."""

import pytest
import torch

from modeling_gpt2_repro import MODEL_SIZES, GPT2ReproConfig, GPT2ReproForCausalLM
from modeling_gpt2_repro.training.memory import StepMemory

SIZES = [64, 32, 16, 8, 4, 2, 1]
# The bytes that torch can use, per GB in the name of a card.
USABLE = 0.97 * 2**30


def describe(model_size: str = "124M", precision: str = "bf16", is_checkpointed: bool = False) -> StepMemory:
    shape = MODEL_SIZES[model_size]
    return StepMemory(
        **{"n_layer": shape["n_layer"], "n_embd": shape["n_embd"], "vocab_size": 50257, "n_positions": 1024},
        sequence_length=1024,
        compute_bytes=4 if precision == "no" else 2,
        is_checkpointed=is_checkpointed,
        loss_chunk_tokens=8192,
    )


@pytest.mark.parametrize("model_size", MODEL_SIZES)
def test_counted_parameters_match_the_model(model_size):
    step = describe(model_size)
    with torch.device("meta"):
        model = GPT2ReproForCausalLM(GPT2ReproConfig(**MODEL_SIZES[model_size]))
    assert step.count_parameters() == model.num_parameters()


@pytest.mark.parametrize(
    "model_size, by_memory",
    [("124M", (64, 64, 32)), ("350M", (64, 32, 8)), ("774M", (32, 8, 2)), ("1558M", (8, 2, 1))],
)
def test_trials_start_at_the_largest_size_estimated_to_fit(model_size, by_memory):
    for gigabytes, size in zip((80, 40, 24), by_memory, strict=True):
        assert describe(model_size).skip_too_large(SIZES, gigabytes * USABLE)[0] == size


def test_sizes_stay_in_order_and_the_last_is_always_tried():
    assert describe().skip_too_large([24, 12, 6, 3], 12 * USABLE) == [12, 6, 3]
    assert describe("1558M").skip_too_large([8, 4], 24 * USABLE) == [4]


def test_float32_needs_more_memory_and_checkpointing_less():
    assert describe(precision="no").estimate(64) > 1.5 * describe().estimate(64)
    assert describe(is_checkpointed=True).estimate(64) < 0.5 * describe().estimate(64)


def test_advice_names_only_what_fits():
    advice = describe("774M").advise(20e9)
    assert "--gradient_checkpointing True" in advice and "--model_size 350M" in advice
    assert "checkpointing" not in describe("1558M").advise(24e9)
    assert describe("1558M", is_checkpointed=True).advise(24e9).startswith("--model_size 774M")
    assert describe("124M", is_checkpointed=True).advise(1e9) == ""
