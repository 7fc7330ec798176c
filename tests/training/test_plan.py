"""The arithmetic of a run, checked against published figures."""

from dataclasses import replace

import pytest

from modeling_gpt2_repro.training.building import build_skeleton
from modeling_gpt2_repro.training.config import TrainingConfig
from modeling_gpt2_repro.training.plan import Plan, count_flops_per_token

REPRODUCTION = Plan(
    config=TrainingConfig(max_steps=19_073),
    n_processes=8,
    micro_batch_sizes=[64],
    micro_batch_size=64,
    first_step=0,
    max_steps=19_073,
    last_step=19_073,
    n_windows=9_623_046,
    n_parameters=124_439_808,
    flops_per_token=855_259_000,
    eval_tokens=10_485_760,
    hellaswag_tokens=3_002_558,
)


@pytest.mark.parametrize(
    "model_size, n_parameters", [("124M", 124_439_808), ("350M", 354_823_168), ("1558M", 1_557_611_200)]
)
def test_parameters_and_flops_match_the_published_sizes(model_size, n_parameters):
    config = TrainingConfig(model_size=model_size)
    model = build_skeleton(config, vocab_size=50257)
    assert model.num_parameters() == n_parameters
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    shape = model.config
    in_matrices = n_parameters - 1024 * shape.n_embd
    attention = 12 * shape.n_layer * shape.n_embd * 1024
    assert count_flops_per_token(model, 1024) == 6 * in_matrices + attention


@pytest.mark.parametrize(
    "max_steps, first_step, every", [(10, 0, 5), (12, 0, 5), (12, 7, 5), (12, 10, 5), (3, 0, 250)]
)
def test_evaluations_in_the_rest_of_a_run_are_counted(max_steps, first_step, every):
    plan = replace(REPRODUCTION, max_steps=max_steps, last_step=max_steps, first_step=first_step)
    # The first step of a resumed run counts if an evaluation is due there, although it was made before saving: an
    # upper bound.
    start = first_step - first_step % every
    due = [step for step in range(start, max_steps + 1) if plan.is_due(every, step)]
    assert plan.count_due(every) == len(due)
    assert plan.count_due(0) == 0


def test_duration_follows_from_the_rate_and_includes_evaluations():
    training = 19_073 * 524_288
    # 77 multiples of 250 from 0 to 19,000, and the end; a forward pass is a third of a training step.
    evaluation = 78 * (10_485_760 + 3_002_558) / 3
    assert REPRODUCTION.estimate_seconds(1e6) == pytest.approx((training + evaluation) / 1e6)
    alone = replace(REPRODUCTION.config, eval_every=0, hellaswag_every=0)
    assert replace(REPRODUCTION, config=alone).estimate_seconds(1e6) == pytest.approx(training / 1e6)


def test_costs_include_the_accumulation_on_other_numbers_of_processes():
    text = "\n".join(REPRODUCTION.describe_costs())
    assert "524,288 tokens = 8 process(es) x 1 micro-step(s) x 64 sequence(s) x 1,024 tokens" in text
    assert "on 1 process(es) 8 micro-step(s) x 64 sequence(s)" in text
    assert "19,073 steps = 1.015 epochs, 9,999,745,024 tokens; warm-up 715 steps" in text
    assert "PaLM paper" in text and "8.55e+18 in total" in text
    assert "78 x 10,485,760 validation tokens" in text
    assert "2.9 h at 1,000,000 tokens/s" in text
    # A micro-batch size that other numbers of processes cannot use does not concern this run.
    small = TrainingConfig(max_steps=10, tokens_per_step=65_536, micro_batch_size="64")
    alone = replace(REPRODUCTION, n_processes=1, config=small)
    assert "on 2 process(es) 1 micro-step(s) x 32 sequence(s)" in "\n".join(alone.describe_costs())
    at_a_rate = replace(REPRODUCTION, config=replace(REPRODUCTION.config, plan_tokens_per_second=1.5e6))
    assert at_a_rate.describe_costs()[-1] == "time        1.9 h at 1,500,000 tokens/s"


def test_checkpoints_waiting_for_the_hub_count_as_disk_space():
    """In the worst case all 20 wait, each a model of 4 bytes per parameter."""
    published = replace(REPRODUCTION, config=replace(REPRODUCTION.config, push_to_hub=True))
    assert published.estimate_disk_bytes() - REPRODUCTION.estimate_disk_bytes() == 20 * 4 * REPRODUCTION.n_parameters
