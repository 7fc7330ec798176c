"""The `publish` command: upload a finished run to the Hugging Face Hub."""

import os
from dataclasses import dataclass
from pathlib import Path

from ..core.arguments import Config, setting
from ..core.errors import UserError
from ..core.hub_client import describe_hub_failure
from ..core.streams import silence_libraries
from ..publishing.hub import explain_failure, name_address, open_repository, publish_earlier, publish_final
from ..training.checkpoint import list_models
from ..training.run_folder import RunFolder


@dataclass
class PublishConfig(Config):
    """Command-line flags."""

    folder: str = setting("", "folder of a finished run", path=True, positional=True, metavar="RUN")
    repo_id: str | None = setting(
        None, "repository, as user/name or a name in your own namespace; default: the run's name"
    )
    public: bool = setting(False, "make the repository public")
    checkpoints: bool = setting(False, "also upload the saved checkpoints, each with a tag such as step-0000250")


def run(config: PublishConfig) -> None:
    """Upload a finished run and print its URL."""
    folder = RunFolder(config.folder)
    if not folder.config.is_file():
        raise UserError(f"{folder} is not a run folder: it has no {folder.config.name}")
    if not folder.final.is_dir():
        raise UserError(f"{folder} has no {folder.final.name}/: pass the folder of a finished run")
    silence_libraries()
    try:
        name = config.repo_id or Path(os.path.abspath(folder.path)).name
        repo_id = open_repository(name, config.public, "--repo_id")
        publish_final(repo_id, folder)
        if config.checkpoints:
            publish_earlier(repo_id, list_models(folder.checkpoints), folder)
    except Exception as error:
        if isinstance(error, UserError) or describe_hub_failure(error) is None:
            raise
        message = f"the upload failed: {explain_failure(error)}. Repeat the command to resume it"
        raise UserError(message) from error
    print(f"published {folder} to {name_address(repo_id)}")
