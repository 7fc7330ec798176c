"""Updates that a run passes over, because their data would break it."""

import re
from collections.abc import Iterable, Sequence

from ..core.errors import UserError


def parse_skips(texts: Sequence[str]) -> list[range]:
    """Read `A:B`, the updates from A to B with both of them, as ranges.

    Raises:
        UserError: something else, or B before A.
    """
    skips = []
    for text in texts:
        match = re.fullmatch(r"(\d{1,15}):(\d{1,15})", text)
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise UserError(
                f"--skip_steps {text}: has to be A:B, updates from 1 on with A not above B, such as 120:121"
            )
        skips.append(range(int(match[1]), int(match[2]) + 1))
    return skips


def merge_skips(saved: Iterable[range], asked: Iterable[range], first_step: int) -> list[range]:
    """Return what a resumed run passes over: what it did before, and what is asked for now, sorted.

    Args:
        first_step: completed updates; what they were made of can no longer be changed.

    Raises:
        UserError: an update asked to be skipped was made.
    """
    merged = set(saved)
    for skip in asked:
        if skip not in merged and skip.start <= first_step:
            raise UserError(
                f"--skip_steps {skip.start}:{skip.stop - 1}: the checkpoint has made these updates, up to "
                f"{first_step}: resume from one before them (--resume_from_checkpoint)"
            )
        merged.add(skip)
    return sorted(merged, key=lambda skip: (skip.start, skip.stop))


def check_any_made(skips: Iterable[range], first_step: int, max_steps: int) -> None:
    """Raise a `UserError` where no update of a run from `first_step` to `max_steps` is left to be made."""
    left = first_step + 1
    for skip in sorted(skips, key=lambda skip: skip.start):
        left = max(left, skip.stop) if left in skip else left
    if first_step < max_steps < left:
        raise UserError(f"--skip_steps passes over every update from {first_step + 1} to {max_steps}: none is left")
