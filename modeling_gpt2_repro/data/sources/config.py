"""The settings that name a corpus; without what it takes to read one, which loads slowly."""

from dataclasses import dataclass

from ...core.arguments import Config, experiment
from ...core.errors import UserError

FINEWEB_EDU = "HuggingFaceFW/fineweb-edu"
DEFAULT_CONFIGS = {FINEWEB_EDU: "sample-10BT"}
# The built-in offline corpus.
DOCSTRINGS = "docstrings"


@dataclass
class SourceConfig(Config):
    """Where documents come from, which is recorded beside the shards. `build_corpus` opens it."""

    dataset_name: str = experiment(
        FINEWEB_EDU,
        f"a dataset on the Hub, a folder that `datasets` can load, or {DOCSTRINGS}: the built-in offline corpus, the "
        "documentation of the Python packages installed here",
        heading="source",
        aliases=["--dataset"],
        path=True,
    )
    dataset_config_name: str | None = experiment(
        None, f"the dataset's configuration; none means {DEFAULT_CONFIGS[FINEWEB_EDU]} for {FINEWEB_EDU}"
    )
    split: str = experiment("train", "the dataset's split")
    revision: str | None = experiment(None, "the dataset's branch, tag or commit; none means main")
    files: list[str] = experiment(
        [],
        "local files, globs or folders instead of a dataset: .parquet, .jsonl[.gz|.zst], .txt[.gz] (one document a "
        "file, or see --document_separator)",
        path=True,
    )
    document_separator: str | None = experiment(
        None,
        "cut .txt files into documents at this text (\\n is a line end of any system, \\t a tab, \\f a form feed)",
    )
    text_column: str = experiment("text", "the column, or JSON key, that holds a document's text")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.document_separator == "":
            raise UserError("--document_separator is empty: leave it out to take each file as one document")
