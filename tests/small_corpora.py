"""A corpus, a tokenizer and shards small enough for a whole run to take less than a second."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import prepare_data
from modeling_gpt2_repro.evaluation.hellaswag_data import SAMPLE_FILE
from modeling_gpt2_repro.training.config import TrainingConfig

STORY = (
    "The old lighthouse keeper counted the ships each evening and wrote their names into a book. "
    "When the fog came he rang the bell, and when the fog left he slept. "
    "One winter a ship did not answer the bell, and the keeper rowed out to look for her. "
)


def draw_documents(count: int) -> list[str]:
    """Return documents of the story's sentences, each in its own order; the same on every call."""
    sentences = [sentence + "." for sentence in STORY.split(". ")]
    generator = np.random.default_rng(0)
    return [" ".join(generator.permutation(sentences)) for _ in range(count)]


def write_tokenizer(folder: Path, vocab_size: int = 300, texts: Sequence[str] = (STORY,)) -> Path:
    """Write a byte-level tokenizer."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>").save_pretrained(folder)
    return folder


def write_corpus(path: Path, n_documents: int = 60) -> Path:
    """Write a JSON Lines file of distinct documents."""
    texts = [f"{number}: {STORY[: 40 + 7 * (number % 20)]}" for number in range(n_documents)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def list_data_flags(corpus: Path, tokenizer: Path, output_dir: Path) -> list[str]:
    """Return the flags for prepare_data.py to write four shards of the corpus in one process."""
    flags = {"files": corpus, "tokenizer": tokenizer, "output_dir": output_dir, "val_tokens": 300}
    flags |= {"shard_size": 1500, "num_workers": 1}
    return [f"--{name}={value}" for name, value in flags.items()]


def write_small_data(folder: Path) -> Path:
    """Write a corpus, a tokenizer and their shards; return the folder of the shards."""
    tokenizer, corpus = write_tokenizer(folder / "tokenizer"), write_corpus(folder / "corpus.jsonl")
    assert prepare_data.main(list_data_flags(corpus, tokenizer, folder / "data")) == 0
    return folder / "data"


def write_story_data(folder: Path) -> Path:
    """Write three shards of the story, with a tokenizer of 1,000 ids that has words for prompts and HellaSwag items.

    With so few ids, a step of a small model costs a fraction of a step with GPT-2's 50,257.
    """
    texts = [STORY, TrainingConfig.sample_prompt] * 20 + [SAMPLE_FILE.read_text(encoding="utf-8")]
    tokenizer, corpus = write_tokenizer(folder / "tokenizer", 1000, texts), folder / "story.jsonl"
    documents = enumerate(draw_documents(160))
    corpus.write_text("".join(json.dumps({"text": f"{number}. {text}"}) + "\n" for number, text in documents))
    flags = [f"--files={corpus}", f"--tokenizer={tokenizer}", f"--output_dir={folder / 'data'}"]
    assert prepare_data.main([*flags, "--val_tokens=1000", "--shard_size=5000", "--num_workers=1"]) == 0
    return folder / "data"
