"""What is asked of a preparation, and what its workers know of that."""

import dataclasses
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from modeling_gpt2_repro.data.prepare.encoder import DocumentEncoder
from modeling_gpt2_repro.data.sources.corpus import Corpus
from modeling_gpt2_repro.data.tokenizer import fingerprint_tokenizer


@dataclasses.dataclass(frozen=True)
class ShardOptions:
    """How documents become shards.

    Attributes:
        shard_size: tokens in each shard but the last of a split.
        val_tokens: tokens of the validation split; None for one shard, at most a tenth of the corpus.
        max_tokens: read the shortest prefix of the corpus that has so many tokens; None for all.
        seed: key of the shuffle.
        shuffle: False keeps the source order.
        num_workers: processes; changes nothing but the time.
    """

    shard_size: int
    val_tokens: int | None
    max_tokens: int | None
    seed: int
    shuffle: bool
    num_workers: int


@dataclasses.dataclass(frozen=True)
class Request:
    """What is to be made.

    Attributes:
        corpus: the documents.
        tokenizer_name: where `tokenizer` came from.
        settings: what the manifest records as asked for.
    """

    corpus: Corpus
    tokenizer: PreTrainedTokenizerFast
    tokenizer_name: str
    options: ShardOptions
    settings: dict[str, Any]

    def describe(self) -> dict[str, Any]:
        """Return, as JSON, what two runs have to agree on to work on the same shards."""
        return {
            "settings": self.settings,
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
    options: ShardOptions
