"""A corpus, a tokenizer and shards so small that whole runs take less than a second."""

import json
from pathlib import Path

from conftest import STORY
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import prepare_data


def write_tokenizer(folder: Path) -> Path:
    """Write a byte-level tokenizer of 300 ids."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([STORY], trainer)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>").save_pretrained(folder)
    return folder


def write_corpus(path: Path, n_documents: int = 60) -> Path:
    """Write a jsonl file of documents no two of which are the same."""
    texts = [f"{number}: {STORY[: 40 + 7 * (number % 20)]}" for number in range(n_documents)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def list_data_flags(corpus: Path, tokenizer: Path, output_dir: Path) -> list[str]:
    """Return the flags with which prepare_data.py makes four shards of the corpus, in one process."""
    flags = {"files": corpus, "tokenizer": tokenizer, "output_dir": output_dir, "val_tokens": 300}
    flags |= {"shard_size": 1500, "num_workers": 1}
    return [f"--{name}={value}" for name, value in flags.items()]


def write_small_data(folder: Path) -> Path:
    """Write a corpus, a tokenizer and their shards, and return the folder of these."""
    tokenizer, corpus = write_tokenizer(folder / "tokenizer"), write_corpus(folder / "corpus.jsonl")
    assert prepare_data.main(list_data_flags(corpus, tokenizer, folder / "data")) == 0
    return folder / "data"
