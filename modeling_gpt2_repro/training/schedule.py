"""Learning-rate schedules, as pure functions of the step."""

import math
from dataclasses import dataclass

# Fraction of the run over which `wsd` (warm-up, stable, decay) decays; sufficient according to Hägele et al. 2024.
WSD_DECAY_FRACTION = 0.2


@dataclass(frozen=True)
class Schedule:
    """The learning rate of each update, counted from 0.

    The rate rises linearly to `peak`, reached at update `warmup_steps - 1`. Then, by `kind`: `cosine` decays to
    `peak * min_ratio` at `max_steps`; `wsd` stays at `peak` and decays linearly to the same value over the last fifth
    of the run; `constant` stays at `peak`.
    """

    kind: str
    peak: float
    min_ratio: float
    warmup_steps: int
    max_steps: int

    def __call__(self, step: int) -> float:
        """Return the learning rate of update `step`."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        if self.kind == "constant":
            return self.peak
        if self.kind == "wsd":
            decay_steps = max(1, round(WSD_DECAY_FRACTION * self.max_steps))
            remaining = min(1.0, max(0, self.max_steps - step) / decay_steps)
        else:
            progress = min(1.0, (step - self.warmup_steps) / max(1, self.max_steps - self.warmup_steps))
            remaining = 0.5 * (1 + math.cos(math.pi * progress))
        return self.peak * (self.min_ratio + (1 - self.min_ratio) * remaining)
