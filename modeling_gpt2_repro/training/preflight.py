"""Checks before the first step for failures that would come hours later."""

import os
import shutil
from pathlib import Path

from ..core.errors import UserError
from ..core.files import follow_links, is_utf8
from .console import format_duration
from .optim import N_MOMENTS

WEIGHT_BYTES = 4  # of a weight, and of each of its moments, in float32
LONGEST_CPU_RUN_SECONDS = 7 * 24 * 3600


def estimate_disk_bytes(n_parameters: int, n_saves: int, keep_checkpoints: int, n_models: int = 0) -> int:
    """Return an upper bound of a run's disk use: the checkpoints kept, one more while it is written, and models.

    Args:
        n_saves: checkpoints that the rest of the run will write, at least one.
        keep_checkpoints: checkpoints to keep; 0 keeps all.
        n_models: models without training state, in addition to `final/`.
    """
    n_checkpoints = min(n_saves, keep_checkpoints + 1) if keep_checkpoints else n_saves
    weights = n_parameters * WEIGHT_BYTES
    return n_checkpoints * (1 + N_MOMENTS) * weights + (n_models + 1) * weights


def measure_folder(folder: Path) -> int:
    """Return the total size of the files in a folder in bytes; 0 if there is no folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def check_disk(folder: Path, needed_bytes: int) -> None:
    """Raise a `UserError` if `folder`, or its nearest existing parent, is not writable or lacks `needed_bytes`."""
    folder = follow_links(folder)
    if not is_utf8(folder):
        raise UserError(f"cannot write to {folder}: its name is not UTF-8, which some libraries reject: rename it")
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"cannot write to {existing} for --output_dir: choose a folder with write permission")
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise UserError(
            f"the run needs up to {needed_bytes / 1e9:.1f} GB in {folder}, but only {free / 1e9:.1f} GB are free: "
            "free some space, choose another --output_dir, or lower --keep_checkpoints"
        )


def check_duration(seconds: float, device_type: str, is_accepted: bool) -> None:
    """Raise a `UserError` if a CPU run is projected to take more than a week, unless the user accepted that."""
    if device_type == "cpu" and seconds > LONGEST_CPU_RUN_SECONDS and not is_accepted:
        raise UserError(
            f"on this CPU the run would take about {format_duration(seconds)}: add --yes to start it anyway, or use "
            "configs/laptop.yaml, a model sized for a CPU; --plan shows the arithmetic"
        )
