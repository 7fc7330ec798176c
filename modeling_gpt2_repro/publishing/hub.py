"""A run on the Hugging Face Hub.

The repository's main holds the newest model of the run, at last the finished one, in the form that opens as GPT-2; a
tag `step-0000250` names the commit with the model after that many updates. Each model is one commit, of all its files
or of none, and only what differs from what is there travels: an upload that broke off goes on when it is asked for
again, and one that is complete asks the Hub and does nothing.
"""

import contextlib
import fnmatch
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelInfo, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import get_session
from transformers import AutoConfig

from modeling_gpt2_repro.core.errors import UserError, format_line
from modeling_gpt2_repro.core.files import compute_checksum
from modeling_gpt2_repro.core.hub_client import HubUnreachableError, ask_hub, describe_hub_failure
from modeling_gpt2_repro.model.folder import describe_as_gpt2
from modeling_gpt2_repro.publishing.eval_results import FOLDER as EVAL_RESULTS
from modeling_gpt2_repro.publishing.model_card import CARD, CURVES, describe_model
from modeling_gpt2_repro.training.checkpoint import TRAINING_STATE, read_step
from modeling_gpt2_repro.training.run_folder import RunFolder

Answer = TypeVar("Answer")
# A repository with other files than these, and without our code, holds something that is not ours to replace.
MODEL_CODE = "modeling_gpt2_repro.py"
MAIN, EARLIER = "main", "earlier-models"  # branches
HARMLESS = {".gitattributes", CARD, "LICENSE"}
# Files of a model that the next one may not have. Whatever else lies in the repository stays.
REPLACED = ("*.safetensors", "*.safetensors.index.json", f"{EVAL_RESULTS}/*", CURVES)
# How long a connection may be silent: the library itself would wait for ever.
SILENCE_SECONDS = 120

Files = Mapping[str, Path | bytes]


def open_repository(name: str, is_public: bool, flag: str) -> str:
    """Create the model repository, or check that an existing one is ours to write to, and return its id.

    An existing one stays as public or private as it is, unless it is to be public.

    Args:
        name: its id, or its name alone, which lies in the user's own namespace.
        flag: by which the user can give another one, for the messages of errors.

    Raises:
        UserError: no token, no permission, or a repository of something else.
        HubUnreachableError: the Hub did not answer.
    """
    if constants.HF_HUB_OFFLINE:
        raise UserError("publishing needs the Hub, and HF_HUB_OFFLINE says that there is none: unset it")
    if get_token() is None:
        raise UserError("publishing needs a token of the Hub that may write: run `hf auth login` or set HF_TOKEN")
    get_session().timeout = SILENCE_SECONDS
    api = HfApi()
    user = ask_hub(api.whoami, "token")["name"]
    repo_id = name if "/" in name else f"{user}/{name}"

    def ask(question: Callable[[], Answer]) -> Answer:
        try:
            return ask_hub(question, f"repository {repo_id!r}")
        except UserError as error:
            if isinstance(error.__cause__, HfHubHTTPError) and error.__cause__.response.status_code == 403:
                raise UserError(
                    f"{user} may not write to {repo_id}: give a {flag} of your own, or use a token that may write"
                ) from error
            raise

    def find() -> ModelInfo | None:
        with contextlib.suppress(RepositoryNotFoundError):
            return api.model_info(repo_id)
        return None

    found = ask(find)
    if found is None:
        for kind in ("dataset", "space"):
            if ask(lambda kind=kind: api.repo_exists(repo_id, repo_type=kind)):
                raise UserError(f"{repo_id} is a {kind} and no model: give another {flag}")
        ask(lambda: api.create_repo(repo_id, private=not is_public, exist_ok=True))
        return repo_id
    ask(lambda: api.auth_check(repo_id, write=True))
    files = {file.rfilename for file in found.siblings or ()}
    if files - HARMLESS and MODEL_CODE not in files:
        raise UserError(f"{repo_id} holds something else than a model of a run of ours: give another {flag}")
    if is_public and found.private:
        ask(lambda: api.update_repo_settings(repo_id, private=False))
    return repo_id


def publish_final(repo_id: str, run_folder: Path) -> None:
    """Make main the finished model of a run, in `final/`."""
    commit_files(repo_id, collect_model(run_folder / "final", run_folder, repo_id), "The finished model")


def publish_earlier(repo_id: str, folders: Iterable[Path], run_folder: Path) -> None:
    """Tag the models in folders called `step_NNNNNNN`, and leave main, which has a newer one, where it is."""
    api = HfApi()
    # Tags keep the commits once the branch is gone; one that an earlier attempt left is gone on with.
    api.create_branch(repo_id, branch=EARLIER, exist_ok=True)
    for folder in folders:
        publish_checkpoint(repo_id, folder, run_folder, EARLIER)
    api.delete_branch(repo_id, branch=EARLIER)


def publish_checkpoint(repo_id: str, folder: Path, run_folder: Path, branch: str = MAIN) -> None:
    """Make a branch the model in `step_NNNNNNN`, a folder, and tag it; nothing where the tag has these weights."""
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


def collect_model(folder: Path, run_folder: Path, repo_id: str, step: int | None = None) -> dict[str, Path | bytes]:
    """Return what goes to the Hub of a model folder by its path there: its files, in published form, card and curves.

    Args:
        step: of a checkpoint, which the card then speaks of; `None` for the finished model.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files: dict[str, Path | bytes] = {path.relative_to(folder).as_posix(): path for path in paths}
    for name in list(files):
        # What a desktop or an editor leaves in a folder, or a person hides there, is not to be published.
        is_hidden = any(part.startswith(".") for part in name.split("/")) and not name.startswith(f"{EVAL_RESULTS}/")
        if is_hidden or name.startswith(f"{TRAINING_STATE}/"):
            del files[name]
    if (run_folder / CURVES).is_file():
        files[CURVES] = (run_folder / CURVES).read_bytes()  # a run draws them anew while they are sent
    config = AutoConfig.from_pretrained(folder)
    if config.model_type != "gpt2":
        files["config.json"] = json.dumps(describe_as_gpt2(config), indent=2, ensure_ascii=False).encode()
    data_dir = RunFolder(run_folder).read_config().data_dir
    # What a card says of data that are gone by now could not be said again.
    if step is None and CARD in files and not Path(data_dir).is_dir():
        print(format_line(f"the model card stays as it is, since its data, {data_dir}, are not here"), file=sys.stderr)
    else:
        texts = describe_model(folder, run_folder, repo_id=repo_id, step=step)
        files |= {name: text.encode() for name, text in texts.items()}
    return files


def commit_files(repo_id: str, files: Files, message: str, branch: str = MAIN) -> str:
    """Give a branch these files in one commit of what differs, if anything does, and return the commit with them."""
    api = HfApi()
    there = api.list_repo_files(repo_id, revision=branch)
    old = [name for name in there if any(fnmatch.fnmatch(name, each) for each in REPLACED)]
    additions = [CommitOperationAdd(name, content) for name, content in files.items()]
    # One by one: several large files at once would be sent by threads that Python waits for when it is told to stop.
    for addition in additions:
        api.preupload_lfs_files(repo_id, [addition], num_threads=1, revision=branch)
    deletions = [CommitOperationDelete(name) for name in old if name not in files]
    return api.create_commit(repo_id, [*deletions, *additions], commit_message=message, revision=branch).oid


def explain_failure(error: BaseException) -> str:
    """Say in a line why something could not be published."""
    if isinstance(error, UserError | HubUnreachableError):
        return str(error)
    return describe_hub_failure(error) or f"{type(error).__name__}: {error}"


def name_address(repo_id: str) -> str:
    """Return where a repository is to be looked at."""
    return f"{constants.ENDPOINT}/{repo_id}"
