"""Detecting periods in a train loss."""

import numpy as np
import pytest
from conftest import SHARED_DATA

from modeling_gpt2_repro.core.errors import UserError
from modeling_gpt2_repro.plots.curves import Curves, Series, load_curves
from modeling_gpt2_repro.plots.spectrum import build_spectrum_figure, compute_spectrum

REFERENCE_LOG = SHARED_DATA / "reference_runs" / "build_nanogpt_fork_10b.log.txt"
NEEDS_LOG = pytest.mark.skipif(
    not REFERENCE_LOG.exists(), reason="needs ../shared/data/reference_runs, a log of a public run"
)


def build_loss(n_steps: int, period: float | None = None, seed: int = 0, fall_steps: float = 300) -> Series:
    """Return a falling, noisy loss with a wave of a third of the noise's amplitude."""
    steps = np.arange(1, n_steps + 1, dtype=np.float64)
    values = 3 + 8 * np.exp(-steps / fall_steps) + np.random.default_rng(seed).normal(0, 0.06, n_steps)
    return Series(steps, values + (0 if period is None else 0.02 * np.sin(2 * np.pi * steps / period)))


def build_run(loss: Series, name: str = "run") -> Curves:
    return Curves(name, 1, {"train/loss": loss} if len(loss) else {}, "")


@pytest.mark.parametrize("period", [7.0, 35.0, 90.0])
def test_a_wave_far_below_the_noise_is_found(period):
    ((found, power), *others) = compute_spectrum(build_run(build_loss(12_000, period))).list_peaks()
    assert found == pytest.approx(period, rel=0.02)
    assert power > 20 and others == []


@pytest.mark.parametrize("n_steps", [140, 1000, 20_000])
def test_noise_has_no_period(n_steps):
    assert [compute_spectrum(build_run(build_loss(n_steps, seed=seed))).list_peaks() for seed in range(20)] == [
        []
    ] * 20


def test_a_falling_loss_neither_hides_a_period_nor_is_one():
    assert compute_spectrum(build_run(build_loss(140, fall_steps=1000))).powers.max() < 4
    falling = build_loss(1000, fall_steps=300)
    wave = 0.05 * np.sin(2 * np.pi * falling.steps / 20)
    ((period, _),) = compute_spectrum(build_run(Series(falling.steps, falling.values + wave))).list_peaks()
    assert period == pytest.approx(20, rel=0.1)


def test_missing_steps_do_not_shift_a_period():
    loss = build_loss(12_000, 35.0)
    kept = np.random.default_rng(1).random(12_000) > 0.1
    peaks = compute_spectrum(build_run(Series(loss.steps[kept], loss.values[kept]))).list_peaks()
    assert peaks[0][0] == pytest.approx(35.0, rel=0.02)


@pytest.mark.parametrize("loss", [build_loss(100), Series(np.array([]), np.array([])), build_loss(1)])
def test_short_runs_are_rejected(loss):
    with pytest.raises(UserError, match="run: detecting periods needs at least 128 steps"):
        compute_spectrum(build_run(loss))


def test_a_constant_loss_is_rejected():
    with pytest.raises(UserError, match="run: the train loss never changes"):
        compute_spectrum(build_run(Series(np.arange(1000.0), np.full(1000, 3.0))))


def test_panels_share_their_y_limits():
    losses = {"plain": build_loss(2000), "periodic": build_loss(2000, 35.0)}
    runs = [build_run(loss, name) for name, loss in losses.items()]
    first, second = build_spectrum_figure(runs).axes
    alone = build_spectrum_figure(runs[1:]).axes[0]
    assert first.get_ylim() == second.get_ylim() == alone.get_ylim()


@NEEDS_LOG
def test_the_original_order_of_documents_is_visible_in_its_loss():
    peaks = compute_spectrum(load_curves(REFERENCE_LOG)).list_peaks()
    assert [round(period) for period, _ in peaks[:2]] == [47, 35]
    assert peaks[0][1] > 300
