"""A run on the Hugging Face Hub: what is uploaded of it, and how.

Whatever lies in the model's folder travels (weights, code, tokenizer, files of yours), but for hidden files and the
training state (`_is_published`); curves, card and scores are added. The files of metrics, samples, logs and settings
stay; the card quotes from them (`model_card.describe_model`).

The repository's main branch holds the newest model of the run, at last the finished one, in the form that opens as
GPT-2; a tag `step-0000250` names the commit with the model after that many updates. Each model is one commit, of all
its files or of none, and only files that differ are sent: repeating an interrupted upload continues it, and repeating
a complete one sends nothing.
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

# A repository with other files than these, and without our code, holds something that is not ours to replace.
MODEL_CODE = "modeling_gpt2_repro.py"
HARMLESS = {".gitattributes", CARD, "LICENSE"}
MAIN, EARLIER = "main", "earlier-models"  # branches
# Files of a model that the next one may not have. Any other file in the repository stays.
REPLACED = ("*.safetensors", "*.safetensors.index.json", f"{EVAL_RESULTS}/*", CURVES)
# How long a connection may be silent; without a limit the library waits indefinitely.
UPLOAD_TIMEOUT_SECONDS = 120

Files = Mapping[str, Path | bytes]


def open_repository(name: str, is_public: bool, flag: str) -> str:
    """Create the model repository, or check that an existing one is ours to write to, and return its id.

    An existing one stays as public or private as it is, unless it is to be public.

    Args:
        name: its id, or its name alone, in the user's own namespace.
        flag: the flag that gives another name, for error messages.

    Raises:
        UserError: no token, no permission, or a repository of something else.
        HubUnreachableError: the Hub did not answer.
    """
    if constants.HF_HUB_OFFLINE:
        raise UserError("publishing needs the Hub, and HF_HUB_OFFLINE says that there is none: unset it")
    if get_token() is None:
        raise UserError("publishing needs a token of the Hub that may write: run `hf auth login` or set HF_TOKEN")
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
            f"{user} may not write to {repo_id}: give a {flag} of your own, or use a token that may write"
        ) from error
    return repo_id


def create_repository(repo_id: str, is_public: bool, flag: str) -> None:
    """Create a model repository, unless its name is a dataset's or a space's."""
    ask = partial(ask_hub, what=f"repository {repo_id!r}")
    for kind in ("dataset", "space"):
        if ask(partial(HfApi().repo_exists, repo_id, repo_type=kind)):
            raise UserError(f"{repo_id} is a {kind} and no model: give another {flag}")
    ask(partial(HfApi().create_repo, repo_id, private=not is_public, exist_ok=True))


def check_repository(repo_id: str, is_public: bool, flag: str) -> None:
    """Check that a repository may be written to and holds nothing else than our models; make it public if asked to."""
    ask = partial(ask_hub, what=f"repository {repo_id!r}")
    ask(partial(HfApi().auth_check, repo_id, write=True))
    found = ask(partial(HfApi().model_info, repo_id))
    files = {file.rfilename for file in found.siblings or ()}
    if files - HARMLESS and MODEL_CODE not in files:
        raise UserError(f"{repo_id} does not look like a model from this package: give another {flag}")
    if is_public and found.private:
        ask(partial(HfApi().update_repo_settings, repo_id, private=False))


def publish_final(repo_id: str, run_folder: RunFolder) -> None:
    """Put the finished model of a run on main."""
    commit_files(repo_id, collect_model(run_folder.final, run_folder, repo_id), "The finished model")


def publish_earlier(repo_id: str, folders: Iterable[Path], run_folder: RunFolder) -> None:
    """Tag the models in folders called `step_NNNNNNN`, and leave main, which has a newer one, unchanged."""
    api = HfApi()
    # Tags keep the commits once the branch is deleted; a branch that an interrupted upload left is continued.
    api.create_branch(repo_id, branch=EARLIER, exist_ok=True)
    for folder in folders:
        publish_checkpoint(repo_id, folder, run_folder, EARLIER)
    api.delete_branch(repo_id, branch=EARLIER)


def publish_checkpoint(repo_id: str, folder: Path, run_folder: RunFolder, branch: str = MAIN) -> None:
    """Commit the model in a folder called `step_NNNNNNN` to a branch and tag it, unless the tag has these weights."""
    step = read_step(folder)
    tag = f"step-{step:07d}"
    api = HfApi()
    weights = {path.name: compute_checksum(path) for path in folder.glob("*.safetensors")}
    tagged = None
    with contextlib.suppress(RevisionNotFoundError):
        tagged = api.get_paths_info(repo_id, list(weights), revision=tag)
    if tagged and {file.path: file.lfs and f"sha256:{file.lfs.sha256}" for file in tagged} == weights:
        return
    files = collect_model(folder, run_folder, repo_id, step)
    commit = commit_files(repo_id, files, f"The model after {step} updates", branch)
    if tagged is not None:  # of an earlier run of the same name
        api.delete_tag(repo_id, tag=tag)
    api.create_tag(repo_id, tag=tag, revision=commit)


def collect_model(
    folder: Path, run_folder: RunFolder, repo_id: str, step: int | None = None
) -> dict[str, Path | bytes]:
    """Return the published form of a model folder, by path in the repository: its files, the card and the curves.

    Args:
        step: of a checkpoint, which the card then describes; `None` for the finished model.
    """
    paths = {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if path.is_file()}
    files: dict[str, Path | bytes] = {name.as_posix(): path for name, path in paths.items() if _is_published(name)}
    if run_folder.curves.is_file():
        files[CURVES] = run_folder.curves.read_bytes()  # a run draws them anew while they are sent
    config = AutoConfig.from_pretrained(folder)
    if config.model_type != "gpt2":
        files["config.json"] = json.dumps(describe_as_gpt2(config), indent=2, ensure_ascii=False).encode()
    data_dir = run_folder.read_config().data_dir
    # A new card would lose what the present one says of data that are gone by now.
    if step is None and CARD in files and not Path(data_dir).is_dir():
        print(format_line(f"the model card stays as it is, since its data, {data_dir}, are not here"), file=sys.stderr)
    else:
        texts = describe_model(folder, run_folder, repo_id=repo_id, step=step)
        files |= {name: text.encode() for name, text in texts.items()}
    return files


def _is_published(name: Path) -> bool:
    """Return whether a file goes to the Hub: not the training state, nor what a desktop, an editor or a user hides."""
    is_hidden = any(part.startswith(".") for part in name.parts)
    return name.parts[0] == EVAL_RESULTS or not (is_hidden or name.parts[0] == TRAINING_STATE)


def commit_files(repo_id: str, files: Files, message: str, branch: str = MAIN) -> str:
    """Commit the files that differ from a branch's, if any, and return the commit that has all of them."""
    api = HfApi()
    present = api.list_repo_files(repo_id, revision=branch)
    replaced = [name for name in present if any(fnmatch.fnmatch(name, pattern) for pattern in REPLACED)]
    additions = [CommitOperationAdd(name, content) for name, content in files.items()]
    # One by one: several large files at once are sent by threads, which delay the exit of a run that is stopped.
    for addition in additions:
        api.preupload_lfs_files(repo_id, [addition], num_threads=1, revision=branch)
    deletions = [CommitOperationDelete(name) for name in replaced if name not in files]
    return api.create_commit(repo_id, [*deletions, *additions], commit_message=message, revision=branch).oid


def explain_failure(error: BaseException) -> str:
    """Return in one line why something could not be published."""
    if isinstance(error, UserError | HubUnreachableError):
        return str(error)
    return describe_hub_failure(error) or f"{type(error).__name__}: {error}"


def name_address(repo_id: str) -> str:
    """Return the web address of a repository."""
    return f"{constants.ENDPOINT}/{repo_id}"
