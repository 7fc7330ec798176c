"""The order of training: the windows of each optimizer step, as a pure function of the step number.

Ranks and micro-steps merely divide a step's windows, and the order does not depend on interruptions. A step therefore
sees the same tokens on any hardware, and a run resumes from its step number alone.

Steps are counted from 0 here: step 1,000 in `metrics.jsonl` consumes `windows_of_step(999)`. `run.build_run` creates
the order from the run's seed and `TrainingConfig.first_permuted_epoch`, which implements `--shuffle_windows`: for a
corpus that is already shuffled, all epochs but the first are permuted. Skipping a step
(`--skip_steps`) leaves the windows of all other steps unchanged. `dataset.TokenDataset` maps windows to tokens.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

FEISTEL_ROUNDS = 8


@dataclass(frozen=True)
class WindowOrder:
    """An infinite sequence of windows: epoch after epoch, each a permutation of all windows.

    Args:
        n_windows: windows per epoch.
        seed: seed of the permutations.
        first_permuted_epoch: earlier epochs are read in order, because a shuffled corpus needs no second shuffle and
            sequential reads are fast; `None` permutes no epoch.
    """

    n_windows: int
    seed: int
    first_permuted_epoch: int | None = 0

    def windows_of_step(self, step: int, windows_per_step: int) -> np.ndarray:
        """Return the window ids of `step` (counted from 0), int64 of shape (windows_per_step,)."""
        positions = np.arange(step * windows_per_step, (step + 1) * windows_per_step, dtype=np.int64)
        epochs, windows = np.divmod(positions, self.n_windows)
        if self.first_permuted_epoch is not None:
            for epoch in np.unique(epochs[epochs >= self.first_permuted_epoch]):
                of_epoch = epochs == epoch
                windows[of_epoch] = permute(windows[of_epoch], self.n_windows, self.seed, int(epoch))
        return windows

    def divide_steps(
        self, steps: Iterable[int], windows_per_step: int, n_ranks: int, rank: int, micro_batch_size: int
    ) -> Iterator[np.ndarray]:
        """Yield one rank's micro-batches step by step, each int64 window ids of shape (micro_batch_size,)."""
        for step in steps:
            windows = self.windows_of_step(step, windows_per_step)
            yield from divide_windows(windows, n_ranks, rank, micro_batch_size)


def divide_windows(windows: np.ndarray, n_ranks: int, rank: int, micro_batch_size: int) -> np.ndarray:
    """Return one rank's share of a step's windows, of shape (micro_steps, micro_batch_size).

    `len(windows)` must be a multiple of `n_ranks * micro_batch_size`; the ranks' shares partition `windows`.
    """
    return windows.reshape(-1, n_ranks, micro_batch_size)[:, rank]


def permute(indices: np.ndarray, size: int, seed: int, epoch: int) -> np.ndarray:
    """Map `indices`, each in [0, size), through the bijection of [0, size) keyed by (seed, epoch).

    A Feistel network over the next even number of bits, with cycle walking until the value is below `size` (Black and
    Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). It needs constant memory and maps indices independently.
    """
    half_bits = np.uint64(max(1, -(-(size - 1).bit_length() // 2)))
    mask = np.uint64((1 << int(half_bits)) - 1)
    key = _mix(np.array([seed], dtype=np.uint64) ^ _mix(np.array([epoch], dtype=np.uint64)))
    round_keys = _mix(np.arange(FEISTEL_ROUNDS, dtype=np.uint64) + key)

    values = indices.astype(np.uint64)
    outside = np.ones(values.shape, dtype=bool)
    while outside.any():
        left, right = values[outside] >> half_bits, values[outside] & mask
        for key in round_keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        values[outside] = (left << half_bits) | right
        outside = values >= np.uint64(size)
    return values.astype(np.int64)


def _mix(values: np.ndarray) -> np.ndarray:
    """Scramble 64-bit integers (the output function of SplitMix64; Steele, Lea and Flood 2014)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
