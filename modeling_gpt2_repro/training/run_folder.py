"""The folder of a run: the names of its files, and how they are read, cleared and checked.

`checkpoint.py` defines the contents of `checkpoints/`, `core/files.py` the names of unfinished files (`.partial`).
Other writers: `trackers.Wandb` (`wandb/`), `eval_hellaswag.py --output` (scores, which `publishing.scores` finds as
`hellaswag*.json`), and `commands.plots` (pictures).
"""

import json
import os
from pathlib import Path
from typing import Any

from ..core.arguments import parse_arguments
from ..core.errors import UserError
from ..core.files import (
    check_writable,
    clear_leftovers,
    follow_links,
    make_folder,
    open_atomically,
    remove_folder,
    resolve_target,
    restore_folder,
    sync_file,
)
from ..data.shards import fingerprint_split
from .checkpoint import list_checkpoints, load_state, prune_checkpoints, remove_models
from .config import TrainingConfig
from .metrics import Metrics, format_log_lines, read_json_lines, read_json_object, read_metrics


class RunFolder:
    """Paths and readers of `runs/NAME/`. Any of its files and folders may be a link to another disk.

    Attributes:
        config: all settings, enough to repeat the run.
        metrics: one JSON object per line; all other reports derive from it.
        log: losses in the original script's format.
        samples: continuations of one prompt, one JSON object per line.
        status: whether the run is running, finished, preempted or failed.
        curves: the picture of the curves.
        lock: names the process that writes to the folder.
        checkpoints: models with training state, `step_N`.
        best: the model with the lowest validation loss; its `best_metrics` has loss and step.
        final: the finished model.
        tensorboard: TensorBoard's event files.
        hub_upload: checkpoints waiting to be uploaded.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.log = self.path / "log.txt"
        self.samples = self.path / "samples.jsonl"
        self.status = self.path / "status.json"
        self.curves = self.path / "curves.png"
        self.lock = self.path / "lock"
        self.checkpoints = self.path / "checkpoints"
        self.best = self.path / "best"
        self.best_metrics = self.best / "metrics.json"
        self.final = self.path / "final"
        self.tensorboard = self.path / "tensorboard"
        self.hub_upload = self.path / "hub_upload"

    def __str__(self) -> str:
        return str(self.path)

    @property
    def files(self) -> list[Path]:
        """The files that a run writes."""
        return [self.config, self.status, *self.replaced_files]

    @property
    def replaced_files(self) -> list[Path]:
        """The files that a run replaces when it starts over."""
        return [self.metrics, self.log, self.samples, self.curves]

    @property
    def replaced_folders(self) -> list[Path]:
        """The folders that a run replaces when it starts over."""
        return [self.checkpoints, self.final, self.best, self.tensorboard]

    def read_config(self) -> TrainingConfig:
        """Read the settings of the run.

        Raises:
            UserError: the file is missing or damaged.
        """
        return parse_arguments(TrainingConfig, [f"--config={self.config}"], description="")

    def read_metrics(self, up_to: int | None = None) -> list[Metrics]:
        """Read the metrics up to a step (`None`: all), one dict per line."""
        return [line for line in read_metrics(self.metrics) if up_to is None or line["step"] <= up_to]

    def read_samples(self) -> list[dict[str, Any]]:
        """Read the samples, each a `step` and a `text`."""
        return read_json_lines(self.samples)

    def read_status(self) -> dict[str, Any]:
        """Read the status of the run; empty if there is none."""
        return read_json_object(self.status)

    def read_best_loss(self, step: int) -> float | None:
        """Return the validation loss of the model in `best/`, or `None` if that model is from after `step`."""
        best = read_json_object(self.best_metrics)
        is_known = isinstance(best.get("step"), int) and isinstance(best.get("val/loss"), float)
        return best["val/loss"] if is_known and best["step"] <= step else None

    def check_data(self, data_dir: str) -> None:
        """Check that a data folder has the training data of the run; without a checkpoint, that it exists.

        Raises:
            UserError: it does not, or this cannot be read.
        """
        found = fingerprint_split(data_dir, "train")
        for checkpoint in list_checkpoints(self.checkpoints)[-1:]:
            if load_state(checkpoint).experiment.get("data") != found:
                raise UserError(f"the training data in {data_dir} changed since the run")

    def get_finished_step(self) -> int:
        """Return the step of the finished model; 0 if there is none or its step is unknown."""
        status = self.read_status()
        is_finished = status.get("status") == "finished" and self.final.is_dir()
        return status["step"] if is_finished and isinstance(status.get("step"), int) else 0

    def prepare(self) -> None:
        """Create the folders that links in the run folder point into."""
        for path in self.files:
            resolve_target(path)
        if self.checkpoints.is_symlink():  # a dangling link would later look like lost checkpoints
            make_folder(self.checkpoints)

    def clear(self, keeps_best: bool) -> None:
        """Delete everything that a run replaces when it starts over."""
        for path in self.replaced_files:
            follow_links(path).unlink(missing_ok=True)
        remove_models(self.checkpoints, after=-1)
        for path in self.replaced_folders:
            # `checkpoints/` itself stays, because it may be a mount point.
            if path != self.checkpoints and not (path == self.best and keeps_best):
                remove_folder(path)

    def go_back(self, step: int) -> None:
        """Delete records and models of updates after `step`."""
        for path in (self.metrics, self.samples):
            if path.exists():
                kept = [line for line in read_json_lines(path) if line["step"] <= step]
                with open_atomically(path) as stream:
                    stream.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in kept)
        with open_atomically(self.log) as stream:
            for line in self.read_metrics():
                stream.writelines(format_log_lines(line))
        remove_models(self.checkpoints, after=step)

    def undo_replacements(self) -> None:
        """Restore `final/` and `best/` if a kill interrupted their replacement."""
        for path in (self.final, self.best):
            restore_folder(path)

    def clear_leftovers(self, config: TrainingConfig) -> None:
        """Clean up after a run that was killed or had a full disk."""
        for path in (self.final, self.best):
            clear_leftovers(path)
        prune_checkpoints(self.checkpoints, config.keep_checkpoints, config.keep_weights_every)

    def sync(self) -> None:
        """Make the records durable, before a checkpoint relies on them."""
        for path in (self.metrics, self.samples):
            if path.exists():
                sync_file(path)

    def check_replaceable(self) -> None:
        """Raise a `UserError` if a new run would replace foreign files: the folder has some, but no `config.yaml`."""
        theirs = [path for path in (*self.replaced_files, *self.replaced_folders) if has_content(path)]
        if theirs and not os.path.lexists(self.config):
            raise UserError(
                f"{self} is not a run folder, and the run would overwrite its {theirs[0].name}: use another --run_name"
            )

    def check_links(self, is_resumed: bool) -> None:
        """Check the targets of links in the folder.

        Raises:
            UserError: a target is not writable, two names share a target, or a resumed run has lost its checkpoints.
        """
        whole_folders = [path for path in self.replaced_folders if path != self.checkpoints]
        paths = [*self.files, *whole_folders, *sorted(self.checkpoints.glob("step_*"))]
        for path in (self.path, self.checkpoints, *paths):
            check_writable(path, is_folder=path in whole_folders)
        for path in paths:
            for other in (self.path, self.checkpoints, *paths):
                if other != path and follow_links(other).is_relative_to(follow_links(path)):
                    raise UserError(
                        f"{path} links to {follow_links(path)}, which also contains {other} and would be replaced "
                        "with it: remove the link, or point it elsewhere"
                    )
        has_begun = any(has_content(path) for path in self.files)
        if is_resumed and has_begun and self.checkpoints.is_symlink() and not self.checkpoints.exists():
            raise UserError(
                f"{self.checkpoints} links to {follow_links(self.checkpoints)}, which does not exist: restore it to "
                "resume, or use --resume_from_checkpoint never to start over"
            )


def has_content(path: Path) -> bool:
    """Return whether a path is a nonempty file or folder; users may create empty ones to link to before a run."""
    return any(path.iterdir()) if path.is_dir() else path.exists() and path.stat().st_size > 0
