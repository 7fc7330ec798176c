"""Corpora: documents from any source, as independent tasks in source order.

To add a source, add a field to `SourceConfig` whose default disables it, a branch to `build_corpus`, and a module that
lists the tasks. `model_card.describe_source` describes the source on model cards.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import huggingface_hub
import pyarrow as pa

from ...core.errors import UserError
from ...core.hub_client import HUB_TIMEOUT_SECONDS, HubUnreachableError, ask_hub
from ...core.optional import not_none
from .config import DEFAULT_CONFIGS, DOCSTRINGS, FINEWEB_EDU, SourceConfig
from .docstrings import describe_packages, list_docstring_tasks
from .hub_datasets import list_hub_tasks
from .local_files import find_files, list_file_tasks

# Escapes in `--document_separator`, which are easier to type in a shell than the characters.
ESCAPES = {"\\r": "\r", "\\n": "\n", "\\t": "\t", "\\f": "\f"}


class Task(Protocol):
    """A part of a corpus that a worker process can read independently. Tasks must be picklable."""

    @property
    def name(self) -> str:
        """The task's name for messages."""

    def read_batches(self) -> Iterator[pa.LargeStringArray]:
        """Yield documents in source order, including empty and null ones, which the caller skips."""


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A source of documents.

    Attributes:
        source: its entry in the manifest: `id`, and `config`, `split`, `revision` or `files`.
        state: a digest by which a resumed run detects changed documents. The manifest omits it, because it depends on
            the files' modification times.
        prefix: the beginning of its shards' names.
        tasks: the tasks in source order, listed lazily.
    """

    source: dict[str, Any]
    state: str
    prefix: str
    tasks: Iterable[Task]


def build_corpus(config: SourceConfig, revision: str | None = None) -> Corpus:
    """Build the corpus selected by `config`.

    Args:
        revision: the dataset commit that an unfinished run started with; the branch may have moved since.

    Raises:
        UserError: as `build_file_corpus` and `build_hub_corpus`.
    """
    if config.files:
        return build_file_corpus(config.files, config.text_column, config.document_separator)
    if config.dataset_name == DOCSTRINGS:
        return build_docstring_corpus()
    revision = revision or config.revision
    return build_hub_corpus(
        config.dataset_name, config.dataset_config_name, config.split, revision, config.text_column
    )


def build_file_corpus(patterns: list[str], text_column: str, document_separator: str | None) -> Corpus:
    """Build a corpus of local files, in the order of their sorted paths.

    Raises:
        UserError: as `find_files`; reading the tasks raises those of `list_file_tasks`.
    """
    if document_separator:
        for spelled, meant in ESCAPES.items():
            document_separator = document_separator.replace(spelled, meant)
    files = find_files(patterns)
    source = {"id": "files", "files": [{"path": str(path), "bytes": path.stat().st_size} for path in files]}
    prefix = _slugify(files[0].name.partition(".")[0]) if len(files) == 1 else "text"
    return Corpus(source, _describe_files(files), prefix, list_file_tasks(files, text_column, document_separator))


def build_docstring_corpus() -> Corpus:
    """Build the built-in offline corpus (`docstrings.py`)."""
    return Corpus({"id": DOCSTRINGS}, describe_packages(), DOCSTRINGS, list_docstring_tasks())


def build_hub_corpus(name: str, config: str | None, split: str, revision: str | None, text_column: str) -> Corpus:
    """Build a corpus that streams a dataset from the Hub, or from a local folder that `datasets` can load.

    The revision is resolved to a commit, which lets the manifest identify the data.

    Raises:
        UserError: the dataset, config, split or column does not exist, or the Hub is unreachable.
    """
    config = config or DEFAULT_CONFIGS.get(name)
    state = ""  # the commit suffices
    if Path(name).is_dir():
        state = _describe_files(sorted(path for path in Path(name).rglob("*") if path.is_file()))
    else:
        revision = _resolve_revision(name, revision)
    tasks = list_hub_tasks(name, config, split, revision, text_column)
    source = {"id": name, "config": config, "split": split, "revision": revision}
    prefix = "edufineweb" if name == FINEWEB_EDU else _slugify(Path(name).name)
    return Corpus(source, state, prefix, tasks)


def _describe_files(paths: Iterable[Path]) -> str:
    facts = [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in paths]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _resolve_revision(name: str, revision: str | None) -> str:
    api = huggingface_hub.HfApi()
    what = f"dataset {name!r}"
    try:
        info = ask_hub(lambda: api.dataset_info(name, revision=revision, timeout=HUB_TIMEOUT_SECONDS), what)
        if info.gated:  # anybody can see it, but not read it
            ask_hub(lambda: api.auth_check(name, repo_type="dataset"), what)
    except HubUnreachableError as error:
        raise UserError(
            f"cannot reach the Hub for the dataset {name!r} ({error}): check the connection, pass --files, or use the "
            f"built-in corpus with --dataset_name {DOCSTRINGS}"
        ) from error
    return not_none(info.sha)


def _slugify(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_") or "text"
