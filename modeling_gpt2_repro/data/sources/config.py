"""The settings that select a corpus, separate from the readers, which import slowly."""

from dataclasses import dataclass

from ...core.arguments import Config, experiment
from ...core.errors import UserError

FINEWEB_EDU = "HuggingFaceFW/fineweb-edu"
DEFAULT_CONFIGS = {FINEWEB_EDU: "sample-10BT"}
# The built-in offline corpus.
DOCSTRINGS = "docstrings"


@dataclass
class SourceConfig(Config):
    """The source of the documents, recorded beside the shards. `build_corpus` opens it."""

    dataset_name: str = experiment(
        FINEWEB_EDU,
        f"Hub dataset, local folder that `datasets` can load, or {DOCSTRINGS} for the built-in offline corpus: the "
        "documentation of the installed Python packages",
        heading="source",
        aliases=["--dataset"],
        path=True,
    )
    dataset_config_name: str | None = experiment(
        None, f"dataset configuration; default: {DEFAULT_CONFIGS[FINEWEB_EDU]} for {FINEWEB_EDU}"
    )
    split: str = experiment("train", "dataset split")
    revision: str | None = experiment(None, "dataset branch, tag or commit; default: main")
    files: list[str] = experiment(
        [],
        "local files, globs or folders instead of a dataset: .parquet, .jsonl[.gz|.zst], .txt[.gz] (one document per "
        "file, unless --document_separator is given)",
        path=True,
    )
    document_separator: str | None = experiment(
        None,
        "text at which to split .txt files into documents (\\n matches any line ending, \\t a tab, \\f a form feed)",
    )
    text_column: str = experiment("text", "column, or JSON key, of the documents' text")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.document_separator == "":
            raise UserError("--document_separator is empty: omit it to read each file as one document")
