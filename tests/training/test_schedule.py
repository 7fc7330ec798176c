"""The learning rate as a function of the step."""

import math

import pytest

from modeling_gpt2_repro.training.schedule import Schedule

REPRODUCTION = {"max_steps": 19073, "warmup_steps": 715, "peak": 6e-4, "min_ratio": 0.1}


def original_script(step: int) -> float:
    if step < 715:
        return 6e-4 * (step + 1) / 715
    progress = (step - 715) / (19073 - 715)
    return 6e-5 + 0.5 * (1 + math.cos(math.pi * progress)) * (6e-4 - 6e-5)


@pytest.mark.parametrize("step", [0, 1, 713, 714, 715, 716, 9000, 19071, 19072])
def test_cosine_is_the_original_scripts_schedule(step):
    assert Schedule(kind="cosine", **REPRODUCTION)(step) == pytest.approx(original_script(step))


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_warm_up_rises_to_the_peak(schedule):
    rates = [Schedule(kind=schedule, **REPRODUCTION)(step) for step in range(716)]
    assert rates == sorted(rates)
    assert rates[0] == pytest.approx(6e-4 / 715)
    assert rates[714] == pytest.approx(6e-4) == rates[715]


def test_wsd_is_constant_and_then_decays():
    schedule = Schedule(kind="wsd", max_steps=100, warmup_steps=10, peak=1.0, min_ratio=0.1)
    rates = [schedule(step) for step in range(101)]
    assert rates[10:81] == [1.0] * 71
    assert rates[90] == pytest.approx(0.55)
    assert rates[100] == pytest.approx(0.1)


def test_constant_never_decays():
    assert Schedule(kind="constant", **REPRODUCTION)(19072) == 6e-4


def test_without_warm_up_the_rate_starts_at_the_peak():
    assert Schedule(kind="cosine", max_steps=10, warmup_steps=0, peak=1.0, min_ratio=0.0)(0) == 1.0
