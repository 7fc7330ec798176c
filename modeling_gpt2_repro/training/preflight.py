"""What would fail at the end of the night, found out before the first step."""

import os
import shutil
from pathlib import Path

from ..core.errors import UserError
from ..core.files import follow_links, is_utf8
from .console import format_duration
from .optim import N_MOMENTS

WEIGHT_BYTES = 4  # in float32, and each of its moments
LONGEST_CPU_RUN_SECONDS = 7 * 24 * 3600


def estimate_disk_bytes(n_parameters: int, n_saves: int, keep_checkpoints: int, n_models: int = 0) -> int:
    """Return the disk that a run takes at most: the checkpoints kept, one more while it is written, and models.

    Args:
        n_saves: checkpoints that the rest of the run writes, at least one.
        keep_checkpoints: 0 keeps all.
        n_models: models without training state, beside `final/`.
    """
    n_checkpoints = min(n_saves, keep_checkpoints + 1) if keep_checkpoints else n_saves
    weights = n_parameters * WEIGHT_BYTES
    return n_checkpoints * (1 + N_MOMENTS) * weights + (n_models + 1) * weights


def measure_folder(folder: Path) -> int:
    """Return the bytes of the files under a folder, 0 where there is none."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def check_disk(folder: Path, needed_bytes: int) -> None:
    """Raise a `UserError` where `folder`, or what it will be made in, cannot take a run of that size."""
    folder = follow_links(folder)
    if not is_utf8(folder):
        raise UserError(f"cannot write to {folder}: its name is not UTF-8, and not every library takes it: rename it")
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"cannot write to {existing}, where --output_dir is: choose a folder that you may write to")
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise UserError(
            f"the run needs up to {needed_bytes / 1e9:.1f} GB in {folder}, where {free / 1e9:.1f} GB are free: make "
            "room, choose another --output_dir, or keep fewer checkpoints with --keep_checkpoints"
        )


def check_duration(seconds: float, device_type: str, is_accepted: bool) -> None:
    """Raise a `UserError` for a run on a CPU that is projected to take more than a week, unless that was accepted."""
    if device_type == "cpu" and seconds > LONGEST_CPU_RUN_SECONDS and not is_accepted:
        raise UserError(
            f"on this CPU the run would take about {format_duration(seconds)}: --yes starts it all the same; "
            "configs/laptop.yaml is a model that a CPU can train, --plan shows the arithmetic"
        )
