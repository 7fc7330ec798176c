"""Publishing beside the training: a thread that uploads checkpoints from the disk, and the finished model at the end.

A checkpoint waits as hard links in `RUN/hub_upload/step_NNNNNNN`, so that it may be pruned meanwhile, and leaves when
it is on the Hub. What waits when a run is stopped or killed is there when it goes on.
"""

import os
import shlex
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

from huggingface_hub.utils import disable_progress_bars
from huggingface_hub.utils import logging as hub_logging

from modeling_gpt2_repro.core.errors import UserError
from modeling_gpt2_repro.core.files import TEMPORARY_SUFFIX, clear_leftovers, create_folder_atomically, remove_folder
from modeling_gpt2_repro.core.hub_client import HubUnreachableError
from modeling_gpt2_repro.publishing.hub import (
    explain_failure,
    name_address,
    open_repository,
    publish_checkpoint,
    publish_final,
)
from modeling_gpt2_repro.training.checkpoint import TRAINING_STATE, list_models, read_step
from modeling_gpt2_repro.training.config import TrainingConfig
from modeling_gpt2_repro.training.run_folder import RunFolder


class Publisher:
    """Uploads what a run writes. No step waits for it, and nothing that goes wrong in it ends the run.

    The first failure is told at once; with each further checkpoint, and at the end, all that waits is tried again.

    Args:
        is_enabled: no other process of the run publishes; a disabled publisher does nothing.
        say: told of what was published, and of what failed.
    """

    def __init__(self, run_folder: Path, config: TrainingConfig, is_enabled: bool, say: Callable[[str], None]):
        self.run_folder, self.config, self.is_enabled, self.say = run_folder, config, is_enabled, say
        self.waiting = RunFolder(run_folder).uploads
        self._repo_id: str | None = None
        self._has_warned = False
        self._is_finishing = False
        self._is_due = threading.Event()
        # A daemon, so that a run that is asked to stop does not wait for an upload.
        self._thread = threading.Thread(target=self._work, name="publisher", daemon=True)

    def check(self, is_resumed: bool) -> None:
        """Open the repository, to hear of a mistake before the first step.

        Raises:
            UserError: a run that begins could not publish; one that is resumed goes on where the Hub is just
                unreachable.
        """
        if not self.is_enabled:
            return
        try:
            self.say(f"hub         {name_address(self._open())}")
        except HubUnreachableError as error:
            if not is_resumed:
                raise UserError(
                    f"--push_to_hub cannot reach the Hub ({error}): check the connection, or leave it out and publish "
                    f"the finished run with {self._describe_command()}"
                ) from error
            self._warn(error)

    def start(self, first_step: int | None) -> None:
        """Begin to upload, first of all what an earlier attempt left waiting; `None` for a run that begins anew."""
        if not self.is_enabled:
            return
        for folder in list_models(self.waiting):
            if first_step is None or read_step(folder) > first_step:
                remove_folder(folder)
        for leftover in self.waiting.glob(f"step_*{TEMPORARY_SUFFIX}"):
            clear_leftovers(leftover.with_suffix(""))
        self._is_due.set()
        self._thread.start()

    def submit(self, checkpoint: Path) -> None:
        """Take a checkpoint to be uploaded; returns at once."""
        if not self.is_enabled:
            return
        try:
            link_model(checkpoint, self.waiting / checkpoint.name)
        except OSError as error:
            self.say(f"{checkpoint.name} will not be published: {error}")
        self._is_due.set()

    def finish(self) -> None:
        """Upload what still waits and the finished model; returns when that is done, or has failed and is told."""
        if not self.is_enabled:
            return
        self._is_finishing = True
        self._is_due.set()
        if self._thread.is_alive():
            self._thread.join()
        try:
            repo_id = self._upload_waiting()
            publish_final(repo_id, self.run_folder)
            shutil.rmtree(self.waiting, ignore_errors=True)
        except Exception as error:
            self.say(
                f"the run is finished and not published: {explain_failure(error)}. The same command, or "
                f"{self._describe_command()}, tries again"
            )
        else:
            self.say(f"published   {name_address(repo_id)}")

    def _describe_command(self) -> str:
        argv = ["python", "-m", "modeling_gpt2_repro", "publish", str(self.run_folder)]
        argv += ["--repo_id", self.config.hub_model_id] if self.config.hub_model_id else []
        return shlex.join([*argv, *(["--public"] if self.config.hub_public else [])])

    def _open(self) -> str:
        if self._repo_id is None:
            hub_logging.set_verbosity_error()
            disable_progress_bars()
            name = self.config.hub_model_id or self.config.run_name
            self._repo_id = open_repository(name, self.config.hub_public, "--hub_model_id")
        return self._repo_id

    def _work(self) -> None:
        is_last = False
        while not is_last:
            self._is_due.wait()
            self._is_due.clear()
            is_last = self._is_finishing
            try:
                self._upload_waiting()
            except Exception as error:  # whatever the network, the Hub or a library comes up with
                self._warn(error)

    def _upload_waiting(self) -> str:
        """Upload what waits, oldest first, and return where to."""
        repo_id = self._open()
        for folder in list_models(self.waiting):
            publish_checkpoint(repo_id, folder, self.run_folder)
            self.say(f"step {read_step(folder)} is published")
            remove_folder(folder)
        return repo_id

    def _warn(self, error: Exception) -> None:
        if not self._has_warned:
            self.say(f"publishing failed, training goes on and it is tried again: {explain_failure(error)}")
        self._has_warned = True


def link_model(checkpoint: Path, target: Path) -> None:
    """Make `target` another name of a checkpoint's files but its training state; a copy where there are no links."""
    with create_folder_atomically(target) as temporary:
        shutil.copytree(
            checkpoint,
            temporary,
            copy_function=_link,
            ignore=shutil.ignore_patterns(TRAINING_STATE),
            dirs_exist_ok=True,
        )


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
