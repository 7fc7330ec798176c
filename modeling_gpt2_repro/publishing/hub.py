"""Uploading a run to the Hugging Face Hub.

An upload contains all files in the model's folder (weights, code, tokenizer and any that you added) except hidden ones
and the training state (see `_is_published`), plus curves, card and scores. Metrics, samples, logs and settings are not
uploaded; the card quotes from them (`model_card.describe_model`).

The main branch of the repository contains the newest model of the run, eventually the finished one, in the form that
opens as GPT-2. A tag such as `step-0000250` marks the commit of the model after that many updates. Each model is one
atomic commit of all its files, and only changed files are sent: repeating an interrupted upload resumes it, and
repeating a complete one sends nothing.
"""

import contextlib
import fnmatch
import json
import sys
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import get_session
from transformers import AutoConfig

from ..core.errors import UserError, format_line
from ..core.files import compute_checksum
from ..core.hub_client import HubForbiddenError, HubUnreachableError, ask_hub, describe_hub_failure
from ..model.folder import describe_as_gpt2
from ..training.checkpoint import TRAINING_STATE, read_step
from ..training.run_folder import RunFolder
from .model_card import CARD, CURVES, describe_model
from .scores import EVAL_RESULTS

# A repository that has other files than these, but not our code, is not ours to overwrite.
MODEL_CODE = "modeling_gpt2_repro.py"
HARMLESS = {".gitattributes", CARD, "LICENSE"}
MAIN, EARLIER = "main", "earlier-models"  # branches
# Files to delete if the next model lacks them. Any other file in the repository is kept.
REPLACED = ("*.safetensors", "*.safetensors.index.json", f"{EVAL_RESULTS}/*", CURVES)
# Timeout for an idle connection; without one, huggingface_hub waits indefinitely.
UPLOAD_TIMEOUT_SECONDS = 120

Files = Mapping[str, Path | bytes]


def open_repository(name: str, is_public: bool, flag: str) -> str:
    """Create the model repository, or check that an existing one is ours to write to, and return its id.

    An existing repository keeps its visibility, unless `is_public` makes it public.

    Args:
        name: repository id, or a bare name in the user's namespace.
        flag: the flag that sets the name, for error messages.

    Raises:
        UserError: no token, no write access, or the repository contains something else.
        HubUnreachableError: the Hub did not answer.
    """
    if constants.HF_HUB_OFFLINE:
        raise UserError("publishing needs the Hub, but HF_HUB_OFFLINE is set: unset it")
    if get_token() is None:
        raise UserError("publishing needs a Hub token with write access: run `hf auth login` or set HF_TOKEN")
    get_session().timeout = UPLOAD_TIMEOUT_SECONDS
    user = ask_hub(HfApi().whoami, "token")["name"]
    repo_id = name if "/" in name else f"{user}/{name}"
    try:
        if ask_hub(partial(HfApi().repo_exists, repo_id), f"repository {repo_id!r}"):
            check_repository(repo_id, is_public, flag)
        else:
            create_repository(repo_id, is_public, flag)
    except HubForbiddenError as error:
        raise UserError(
            f"{user} has no write access to {repo_id}: pass a {flag} of your own, or use a token with write access"
        ) from error
    return repo_id


def create_repository(repo_id: str, is_public: bool, flag: str) -> None:
    """Create a model repository, unless a dataset or a Space already has its name."""
    ask = partial(ask_hub, what=f"repository {repo_id!r}")
    for kind in ("dataset", "space"):
        if ask(partial(HfApi().repo_exists, repo_id, repo_type=kind)):
            raise UserError(f"{repo_id} is a {kind}, not a model: pass another {flag}")
    ask(partial(HfApi().create_repo, repo_id, private=not is_public, exist_ok=True))


def check_repository(repo_id: str, is_public: bool, flag: str) -> None:
    """Check for write access to a repository, and that it is ours; make it public if requested."""
    ask = partial(ask_hub, what=f"repository {repo_id!r}")
    ask(partial(HfApi().auth_check, repo_id, write=True))
    found = ask(partial(HfApi().model_info, repo_id))
    files = {file.rfilename for file in found.siblings or ()}
    if files - HARMLESS and MODEL_CODE not in files:
        raise UserError(f"{repo_id} does not look like a model from this package: pass another {flag}")
    if is_public and found.private:
        ask(partial(HfApi().update_repo_settings, repo_id, private=False))


def publish_final(repo_id: str, run_folder: RunFolder) -> None:
    """Upload the finished model of a run to main."""
    commit_files(repo_id, collect_model(run_folder.final, run_folder, repo_id), "Upload the finished model")


def publish_earlier(repo_id: str, folders: Iterable[Path], run_folder: RunFolder) -> None:
    """Upload and tag the models in folders named `step_NNNNNNN`, without changing main, which has a newer one."""
    api = HfApi()
    # Tags keep the commits after the branch is deleted. A branch left by an interrupted upload is reused.
    api.create_branch(repo_id, branch=EARLIER, exist_ok=True)
    for folder in folders:
        publish_checkpoint(repo_id, folder, run_folder, EARLIER)
    api.delete_branch(repo_id, branch=EARLIER)


def publish_checkpoint(repo_id: str, folder: Path, run_folder: RunFolder, branch: str = MAIN) -> None:
    """Commit the model in a folder named `step_NNNNNNN` to a branch and tag it, unless the tag has these weights."""
    step = read_step(folder)
    tag = f"step-{step:07d}"
    api = HfApi()
    weights = {path.name: compute_checksum(path) for path in folder.glob("*.safetensors")}
    tagged = None
    with contextlib.suppress(RevisionNotFoundError):
        tagged = api.get_paths_info(repo_id, list(weights), revision=tag)
    tagged_files = [file for file in tagged or () if isinstance(file, RepoFile)]
    if tagged and {file.path: file.lfs and f"sha256:{file.lfs.sha256}" for file in tagged_files} == weights:
        return
    files = collect_model(folder, run_folder, repo_id, step)
    commit = commit_files(repo_id, files, f"Upload the model after {step} updates", branch)
    if tagged is not None:  # by an earlier run of the same name
        api.delete_tag(repo_id, tag=tag)
    api.create_tag(repo_id, tag=tag, revision=commit)


def collect_model(
    folder: Path, run_folder: RunFolder, repo_id: str, step: int | None = None
) -> dict[str, Path | bytes]:
    """Return the published form of a model folder, with card and curves, keyed by path in the repository.

    Args:
        step: the step of a checkpoint, which the card then describes; `None` for the finished model.
    """
    paths = {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if path.is_file()}
    files: dict[str, Path | bytes] = {name.as_posix(): path for name, path in paths.items() if _is_published(name)}
    if run_folder.curves.is_file():
        files[CURVES] = run_folder.curves.read_bytes()  # now, because a run may redraw them
    config = AutoConfig.from_pretrained(folder)
    if config.model_type != "gpt2":
        files["config.json"] = json.dumps(describe_as_gpt2(config), indent=2, ensure_ascii=False).encode()
    data_dir = run_folder.read_config().data_dir
    # A new card would lose the existing one's description of data that is no longer here.
    if step is None and CARD in files and not Path(data_dir).is_dir():
        print(format_line(f"keeping the existing model card, because {data_dir} is not here"), file=sys.stderr)
    else:
        texts = describe_model(folder, run_folder, repo_id=repo_id, step=step)
        files |= {name: text.encode() for name, text in texts.items()}
    return files


def _is_published(name: Path) -> bool:
    """Return whether a file is uploaded: not the training state, nor files hidden by desktops, editors or users."""
    is_hidden = any(part.startswith(".") for part in name.parts)
    return name.parts[0] == EVAL_RESULTS or not (is_hidden or name.parts[0] == TRAINING_STATE)


def commit_files(repo_id: str, files: Files, message: str, branch: str = MAIN) -> str:
    """Commit the files that differ from those on a branch, and return the id of the commit that has all of them."""
    api = HfApi()
    present = api.list_repo_files(repo_id, revision=branch)
    replaced = [name for name in present if any(fnmatch.fnmatch(name, pattern) for pattern in REPLACED)]
    additions = [CommitOperationAdd(name, content) for name, content in files.items()]
    # One at a time: uploads of several large files use threads, which delay the exit of a stopped run.
    for addition in additions:
        api.preupload_lfs_files(repo_id, [addition], num_threads=1, revision=branch)
    deletions = [CommitOperationDelete(name) for name in replaced if name not in files]
    return api.create_commit(repo_id, [*deletions, *additions], commit_message=message, revision=branch).oid


def explain_failure(error: BaseException) -> str:
    """Return a one-line reason for a failed upload."""
    if isinstance(error, UserError | HubUnreachableError):
        return str(error)
    return describe_hub_failure(error) or f"{type(error).__name__}: {error}"


def name_address(repo_id: str) -> str:
    """Return the URL of a repository."""
    return f"{constants.ENDPOINT}/{repo_id}"
