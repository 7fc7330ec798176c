"""Publishing during training: a background thread uploads checkpoints, and at the end the finished model.

Queued checkpoints are hard links in the run folder's `hub_upload`, so that the originals can be pruned in the
meantime, and are deleted there once uploaded. If a run is stopped or killed, its queue is uploaded when it resumes.
"""

import os
import shlex
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

from huggingface_hub.utils import disable_progress_bars
from huggingface_hub.utils import logging as hub_logging

from ..core.errors import UserError
from ..core.files import create_folder_atomically, remove_folder
from ..core.hub_client import HubUnreachableError
from ..training.checkpoint import TRAINING_STATE, clear_unfinished, list_models, read_step, remove_models
from ..training.config import TrainingConfig
from ..training.run_folder import RunFolder
from .hub import explain_failure, name_address, open_repository, publish_checkpoint, publish_final


class Uploader:
    """Uploads the models of a run without blocking or failing it.

    The first failure is reported at once. Each further checkpoint, and the end of the run, retries the whole queue.

    Args:
        is_enabled: a disabled uploader does nothing; only one process of a run uploads.
        say: called with a line about each model published and about failures.
    """

    def __init__(self, folder: RunFolder, config: TrainingConfig, is_enabled: bool, say: Callable[[str], None]):
        self._folder, self._config, self._is_enabled, self._say = folder, config, is_enabled, say
        self._repo_id: str | None = None
        self._has_warned = False
        self._is_finishing = False
        self._is_due = threading.Event()
        # A daemon, so that a run can stop without waiting for an upload.
        self._thread = threading.Thread(target=self._work, name="uploader", daemon=True)

    def check(self, is_resumed: bool) -> None:
        """Open the repository, so that mistakes surface before the first step.

        Raises:
            UserError: the run cannot publish. A resumed run only warns if the Hub is unreachable.
        """
        if not self._is_enabled:
            return
        try:
            self._say(f"hub         {name_address(self._open())}")
        except HubUnreachableError as error:
            if not is_resumed:
                raise UserError(
                    f"--push_to_hub cannot reach the Hub ({error}): check the connection, or drop the flag and "
                    f"publish the finished run with {self._describe_command()}"
                ) from error
            self._warn(error)

    def start(self, first_step: int | None) -> None:
        """Start uploading, first the queue of an earlier attempt; pass `None` for a run that starts over."""
        if not self._is_enabled:
            return
        remove_models(self._folder.hub_upload, after=-1 if first_step is None else first_step)
        self._is_due.set()
        self._thread.start()

    def submit(self, checkpoint: Path) -> None:
        """Queue a checkpoint for upload and return at once."""
        if not self._is_enabled:
            return
        try:
            link_model(checkpoint, self._folder.hub_upload / checkpoint.name)
        except OSError as error:
            self._say(f"{checkpoint.name} will not be published: {error}")
        self._is_due.set()

    def finish(self) -> None:
        """Upload the queue and the finished model; return when done, or after reporting a failure."""
        if not self._is_enabled:
            return
        self._is_finishing = True
        self._is_due.set()
        if self._thread.is_alive():
            self._thread.join()
        try:
            clear_unfinished(self._folder.hub_upload)  # left by an earlier process, if this one had no steps to run
            repo_id = self._upload_waiting()
            publish_final(repo_id, self._folder)
            shutil.rmtree(self._folder.hub_upload, ignore_errors=True)
        except Exception as error:
            self._say(
                f"the run is finished, but publishing failed: {explain_failure(error)}. Retry with the same command, "
                f"or with {self._describe_command()}"
            )
        else:
            self._say(f"published   {name_address(repo_id)}")

    def _describe_command(self) -> str:
        argv = ["python", "-m", "modeling_gpt2_repro", "publish", str(self._folder)]
        argv += ["--repo_id", self._config.hub_model_id] if self._config.hub_model_id else []
        return shlex.join([*argv, *(["--public"] if self._config.hub_public else [])])

    def _open(self) -> str:
        if self._repo_id is None:
            hub_logging.set_verbosity_error()
            disable_progress_bars()
            name = self._config.hub_model_id or self._config.run_name
            self._repo_id = open_repository(name, self._config.hub_public, "--hub_model_id")
        return self._repo_id

    def _work(self) -> None:
        while True:
            self._is_due.wait()
            self._is_due.clear()
            if self._is_finishing:
                return
            try:
                self._upload_waiting()
            except Exception as error:  # from the network, the Hub or any library in between
                self._warn(error)

    def _upload_waiting(self) -> str:
        """Upload the queued checkpoints, oldest first, and return the repository id."""
        repo_id = self._open()
        for model in list_models(self._folder.hub_upload):
            publish_checkpoint(repo_id, model, self._folder)
            self._say(f"step {read_step(model)} is published")
            remove_folder(model)
        return repo_id

    def _warn(self, error: Exception) -> None:
        if not self._has_warned:
            self._say(f"publishing failed; training continues, retrying later: {explain_failure(error)}")
        self._has_warned = True


def link_model(checkpoint: Path, target: Path) -> None:
    """Hard-link a checkpoint's files, except its training state, into `target`; copy them if linking fails."""
    with create_folder_atomically(target) as temporary:
        ignore = shutil.ignore_patterns(TRAINING_STATE)
        shutil.copytree(checkpoint, temporary, copy_function=_link, ignore=ignore, dirs_exist_ok=True)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
