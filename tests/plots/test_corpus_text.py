"""The text summary of a data folder."""

import re

import numpy as np
import pytest

from modeling_gpt2_repro.data.inspection import inspect_folder
from modeling_gpt2_repro.plots.corpus_text import PREVIEW_CHARACTERS, PREVIEW_IDS, describe_inspection

EOT = 50256


def describe(folder, count=0, seed=0, encoding="utf-8"):
    return describe_inspection(inspect_folder(folder, count, seed, PREVIEW_IDS), encoding)


@pytest.fixture
def write(tmp_path, tokenizer):
    """Return a function that writes texts as one shard of a folder without a manifest."""

    def write(*texts, split="train", front=()):
        ids = [index for text in texts for index in (EOT, *tokenizer(text)["input_ids"])]
        np.save(tmp_path / f"x_{split}_000000.npy", np.array([*front, *ids], np.uint16))
        return tmp_path

    return write


def test_the_table_matches_the_folder(write):
    write(" the the the the", " the\n", split="val")
    lines = describe(write("naïve", " a b c d e f g h i", " a")).splitlines()
    table = {name: cells for name, *cells in (re.split("  +", line.strip()) for line in lines)}
    assert table["shards"] == ["1", "1"]
    assert table["tokens"] == ["8", "15"]
    assert table["documents"] == ["2", "3"]
    assert table["bytes of text"] == ["21", "26"]
    assert table["bytes per token"] == [f"{21 / 8:.3f}", f"{26 / 15:.3f}"]
    assert table["ids in use"] == ["3", "12"]
    assert table["shortest"] == ["3", "2"]
    assert table["median"] == ["3", "3"]
    assert table["longest"] == ["5", "10"]
    assert table["mean"] == ["4.0", "5.0"]


def test_columns_are_aligned(write):
    write("a", split="val")
    table = describe(write("a", "a b c")).split("\n\n")[1].splitlines()
    assert len({len(line) for line in table if line.strip() != "tokens per document"}) == 1


def test_short_documents_are_shown_whole(write):
    text = "It’s naïve,\n\n  and\tover\x1b[2J.\n"  # noqa: RUF001
    shown = describe(write(text), 1)
    assert (
        f"--- train, x_train_000000.npy, position 0, {len(np.load(write(text) / 'x_train_000000.npy'))} tokens"
        in shown
    )
    assert shown.endswith("It’s naïve,\n\n  and\\tover\\x1b[2J.\n")  # noqa: RUF001
    assert "[...]" not in shown


@pytest.mark.parametrize("text", ["word " * 2000, "日本語🙂" * 500, "🙂" * 601, "a" * 601, "\u899a\u9418" * 301])
def test_long_documents_are_truncated(write, text):
    _, _, rest = describe(write(text), 1).partition("--- train")
    assert rest.split("\n", 1)[1] == text[:PREVIEW_CHARACTERS] + "\n[...]"


def test_documents_that_fill_the_preview_exactly_are_not_truncated(write):
    assert "[...]" not in describe(write("🙂" * PREVIEW_CHARACTERS), 1)


def test_every_character_is_shown_in_any_terminal_encoding(write):
    shown = describe(write("naïve 日"), 1, encoding="ascii")
    assert shown.isascii()
    assert shown.endswith(r"na\xefve \u65e5")


def test_tokens_before_the_first_document_are_reported(write):
    shown = describe(write("a b", "", front=[5, 6, 7]))
    assert "no manifest: assuming ids of openai-community/gpt2, 50,257 ids, end-of-text id 50256" in shown
    assert "train begins inside a document: its 3 tokens before" in shown
    assert "train has 1 documents without text" in shown


def test_no_documents_at_all(write):
    shown = describe(write(front=[5, 6, 7]), 3)
    assert "no end-of-text id, and hence no documents" in shown
    assert "---" not in shown
