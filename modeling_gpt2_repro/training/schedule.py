"""The learning rate as a pure function of the step."""

import math

# The part of the run that `wsd` (warm-up, stable, decay) spends on the decay: Hägele et al. 2024 find it enough.
WSD_DECAY_FRACTION = 0.2


def is_same_so_far(first_step: int, max_steps: int, other_max_steps: int, **settings) -> bool:
    """Tell whether a run of another length would have made its first `first_step` updates at the same rates."""
    return all(
        compute_learning_rate(step, max_steps=max_steps, **settings)
        == compute_learning_rate(step, max_steps=other_max_steps, **settings)
        for step in range(first_step)
    )


def compute_learning_rate(
    step: int, *, max_steps: int, warmup_steps: int, peak: float, min_ratio: float, schedule: str
) -> float:
    """Return the learning rate of update `step`, counted from 0.

    Linear warm-up to `peak`, which update `warmup_steps - 1` reaches, then by `schedule`: `cosine` falls to
    `peak * min_ratio` at `max_steps`, `wsd` stays and falls linearly over the last fifth, `constant` stays.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    if schedule == "wsd":
        decay_steps = max(1, round(WSD_DECAY_FRACTION * max_steps))
        remaining = min(1.0, max(0, max_steps - step) / decay_steps)
    else:
        progress = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
        remaining = 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (min_ratio + (1 - min_ratio) * remaining)
