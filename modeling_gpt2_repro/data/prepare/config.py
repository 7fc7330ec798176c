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

# Flags of other programs that prepare text, each with what takes its place here.
FOREIGN_FLAGS = yaml.safe_load(Path(__file__).with_name("foreign_flags.yaml").read_text(encoding="utf-8"))


@dataclass
class PrepareConfig(SourceConfig):
    """Every knob of `prepare_data.py`. What is not `resumable` decides the shards, and is recorded beside them."""

    output_dir: str = setting("data/edu_fineweb10B", "the folder for the shards", heading="shards", path=True)
    tokenizer: str = experiment(
        GPT2_TOKENIZER, "Hub id or local folder of a tokenizer with at most 65,536 ids", path=True
    )
    shard_size: int = experiment(100_000_000, "tokens a shard", least=1, below=2**63)
    val_tokens: int | None = experiment(
        None,
        "tokens of the validation split: the front of the source order, up to the next end of a document; none means "
        "one shard, at most a tenth of the corpus",
        least=1,
        below=2**63,
    )
    max_tokens: int | None = experiment(
        None, "read no more documents than reach this many tokens; none means all", least=1, below=2**63
    )
    seed: int = experiment(1337, "order of the training documents", least=0, below=2**64)
    no_shuffle: bool = experiment(False, "keep the training documents in source order")
    overwrite: bool = setting(False, "replace an existing folder of shards")

    num_workers: int | None = setting(
        None,
        "processes; none means all cores",
        heading="work",
        least=1,
        most=1024,  # all are started at once, and more than any machine has use for would bring it down
    )
    stage: Literal["all", "tokenize", "write"] = setting(
        "all",
        "what to do of the work, for engines that schedule many processes: tokenize the corpus's files, or write the "
        "shuffled documents to shards, either with --task; a last call with all completes the folder",
    )
    task: str = setting("0/1", "the share i/N of a --stage that this process does, i from 0 to N-1")

    verify: bool = setting(
        False, "check the shards in --output_dir against their manifest and exit", heading="an existing folder"
    )
    inspect: int | None = setting(
        None,
        "show this many documents of the shards in --output_dir, chosen by --seed, and statistics of all of them, as "
        "text and as inspection.png beside them, and exit",
        least=0,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.share != (0, 1) and self.stage == "all":
            raise UserError("--task is a share of a --stage: add --stage tokenize or --stage write")
        if self.stage != "all" and self.overwrite:
            raise UserError("--overwrite cannot be given with --stage, whose processes would remove each other's work")

    @property
    def share(self) -> tuple[int, int]:
        """The (i, N) of `--task i/N`."""
        match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", self.task)
        if match is None or not int(match[1]) < int(match[2]):
            raise UserError(f"--task {self.task}: must be i/N with i from 0 to N-1, such as 0/8")
        return int(match[1]), int(match[2])
