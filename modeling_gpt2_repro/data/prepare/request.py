"""What is asked of a preparation, and what its workers know of that."""

import dataclasses
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from modeling_gpt2_repro.data.prepare.config import PrepareConfig
from modeling_gpt2_repro.data.prepare.encoder import DocumentEncoder
from modeling_gpt2_repro.data.sources.corpus import Corpus
from modeling_gpt2_repro.data.tokenizer import fingerprint_tokenizer


@dataclasses.dataclass(frozen=True)
class Request:
    """What is to be made, of which documents and with which tokenizer."""

    corpus: Corpus
    tokenizer: PreTrainedTokenizerFast
    config: PrepareConfig

    @property
    def tokenizer_name(self) -> str:
        """Where the tokenizer came from: a Hub id, or the path of a folder, which does not look like an id."""
        name = self.config.tokenizer
        is_relative = Path(name).is_dir() and not name.startswith((".", "/", "~"))
        return f"./{name}" if is_relative else name

    def describe(self) -> dict[str, Any]:
        """Return, as JSON, what two runs have to agree on to work on the same shards."""
        return {
            "settings": self.config.experiment,
            "source": self.corpus.source,
            "corpus_state": self.corpus.state,
            "tokenizer_fingerprint": fingerprint_tokenizer(self.tokenizer),
        }


@dataclasses.dataclass(frozen=True)
class WorkerContext:
    """What every worker knows.

    Attributes:
        pieces: the folder of finished pieces.
        encoder: None if nothing is left to tokenize.
    """

    pieces: Path
    encoder: DocumentEncoder | None
    config: PrepareConfig
