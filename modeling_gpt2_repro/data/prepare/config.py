"""The settings of `prepare_data.py`."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml

from ...core.arguments import experiment, setting
from ...core.errors import UserError
from ..sources.config import SourceConfig
from ..tokenizer import GPT2_TOKENIZER

# Flags of other data-preparation programs, each with its equivalent here.
FOREIGN_FLAGS = yaml.safe_load(Path(__file__).with_name("foreign_flags.yaml").read_text(encoding="utf-8"))


@dataclass
class PrepareConfig(SourceConfig):
    """All settings of `prepare_data.py`. Those that are not `resumable` determine the shards and are recorded."""

    output_dir: str = setting("data/edu_fineweb10B", "folder for the shards", heading="shards", path=True)
    tokenizer: str = experiment(
        GPT2_TOKENIZER, "Hub id or local folder of a tokenizer with at most 65,536 ids", path=True
    )
    shard_size: int = experiment(100_000_000, "tokens per shard", least=1, below=2**63)
    val_tokens: int | None = experiment(
        None,
        "tokens of the validation split, which is the beginning of the corpus in source order up to the end of a "
        "document; default: one shard, at most a tenth of the corpus",
        least=1,
        below=2**63,
    )
    max_tokens: int | None = experiment(
        None, "stop reading once the documents have this many tokens; default: read all", least=1, below=2**63
    )
    seed: int = experiment(1337, "seed of the training documents' order", least=0, below=2**64)
    no_shuffle: bool = experiment(False, "keep the training documents in source order")
    overwrite: bool = setting(False, "replace an existing data folder")

    num_workers: int | None = setting(
        None,
        "worker processes; default: one per core",
        heading="work",
        least=1,
        most=1024,  # all start at once, and a mistyped number would bring the machine down
    )
    stage: Literal["all", "tokenize", "write"] = setting(
        "all",
        "stage to run, for schedulers of many processes: tokenize the corpus, or write the shuffled documents to "
        "shards, each divided by --task; a final run with all completes the folder",
    )
    task: str = setting("0/1", "share i/N of a --stage for this process, i from 0 to N-1")

    verify: bool = setting(
        False, "check the shards in --output_dir against their manifest and exit", heading="an existing folder"
    )
    inspect: int | None = setting(
        None,
        "print statistics of the shards in --output_dir and this many documents, sampled with --seed, draw them as "
        "inspection.png in the folder, and exit",
        least=0,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.share != (0, 1) and self.stage == "all":
            raise UserError("--task needs a stage: add --stage tokenize or --stage write")
        if self.stage != "all" and self.overwrite:
            raise UserError("--overwrite is not allowed with --stage: the processes would delete each other's work")

    @property
    def share(self) -> tuple[int, int]:
        """The (i, N) of `--task i/N`."""
        match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", self.task)
        if match is None or not int(match[1]) < int(match[2]):
            raise UserError(f"--task {self.task}: must be i/N with i from 0 to N-1, such as 0/8")
        return int(match[1]), int(match[2])
