"""Updates that a run skips because their data would break it."""

import re
from collections.abc import Iterable, Sequence

from ..core.errors import UserError


def parse_skips(texts: Sequence[str]) -> list[range]:
    """Parse inclusive ranges of updates, each written as `A:B`.

    Raises:
        UserError: a text has another form, or B is less than A.
    """
    skips = []
    for text in texts:
        match = re.fullmatch(r"(\d{1,15}):(\d{1,15})", text)
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise UserError(
                f"--skip_steps {text}: must be A:B with 1 <= A <= B, such as 120:121 for updates 120 and 121"
            )
        skips.append(range(int(match[1]), int(match[2]) + 1))
    return skips


def merge_skips(saved: Iterable[range], requested: Iterable[range], first_step: int) -> list[range]:
    """Return the sorted union of a checkpoint's skips and the requested ones.

    Args:
        first_step: completed updates, which can no longer be skipped.

    Raises:
        UserError: a requested skip includes a completed update.
    """
    merged = set(saved)
    for skip in requested:
        if skip not in merged and skip.start <= first_step:
            raise UserError(
                f"--skip_steps {skip.start}:{skip.stop - 1}: the checkpoint already includes updates up to "
                f"{first_step}: resume from an earlier one (--resume_from_checkpoint)"
            )
        merged.add(skip)
    return sorted(merged, key=lambda skip: (skip.start, skip.stop))


def check_any_left(skips: Iterable[range], first_step: int, max_steps: int) -> None:
    """Raise a `UserError` if the skips leave no update between `first_step` and `max_steps`."""
    next_update = first_step + 1
    for skip in sorted(skips, key=lambda skip: skip.start):
        next_update = max(next_update, skip.stop) if next_update in skip else next_update
    if first_step < max_steps < next_update:
        raise UserError(f"--skip_steps skips every update from {first_step + 1} to {max_steps}: leave at least one")
