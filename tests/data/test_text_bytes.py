"""The number of text bytes behind validation tokens, for any tokenizer."""

import json
import math

import numpy as np
import pytest
from small_runs import flags, read_series
from tiny_tokenizers import FAMILIES

import prepare_data
import train
from modeling_gpt2_repro.data.dataset import TokenDataset
from modeling_gpt2_repro.data.shards import TEXT_BYTES_NAME, load_manifest, open_split
from modeling_gpt2_repro.data.text_bytes import NOTE, count_text_bytes
from modeling_gpt2_repro.data.tokenizer import load_data_tokenizer, spells_text, token_byte_lengths

TEXTS = [
    f"{number} The  quick brown Fox\njumps, naïve café {'日本 </s> ' * (number % 3)}"
    + "over the lazy dog " * (number % 7)
    for number in range(60)
]
# Each of these loses spaces, case, accents or unknown words, or marks parts of words.
CHANGING = ["llama", "gemma", "t5", "xlm_roberta", "bert", "clip", "gpt1", "word_level", "word_piece"]


def prepare(folder, family, texts, *more):
    FAMILIES[family]().save_pretrained(folder / "tokenizer")
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    argv = [f"--files={folder / 'texts.jsonl'}", f"--tokenizer={folder / 'tokenizer'}", "--num_workers=1", *more]
    assert prepare_data.main([*argv, f"--output_dir={folder / 'data'}"]) == 0
    return folder / "data"


def count(folder, end, sequence_length=1):
    """Count the bytes of the tokens up to `end`; the first one, an end-of-text id, is never a target."""
    tokenizer = load_data_tokenizer(str(folder))
    dataset = TokenDataset(str(folder), "val", sequence_length, len(tokenizer))
    return count_text_bytes(dataset, (end - 1) // sequence_length, tokenizer)


def find_ends(folder):
    """Return where the documents of the validation split end, in tokens."""
    tokens = np.concatenate(open_split(folder, "val"))
    return [*np.flatnonzero(tokens == load_manifest(folder).eot_id)[1:].tolist(), len(tokens)]


@pytest.mark.parametrize("family", ["gpt2", "qwen", *CHANGING])
def test_byte_counts_match_the_documents(tmp_path, family):
    folder = prepare(tmp_path, family, TEXTS, "--val_tokens=400", "--shard_size=150")
    ends = find_ends(folder)
    sizes = np.cumsum([len(text.encode()) for text in TEXTS])
    assert len(open_split(folder, "val")) > 2 and len(ends) > 5
    for end, size in zip(ends, sizes.tolist(), strict=False):
        counted = count(folder, end)
        assert counted.count == size and counted.is_exact
    # Inside a document the count grows with the tokens.
    inside = [count(folder, end).count for end in range(ends[2] + 1, ends[3] + 1)]
    assert inside == sorted(inside) and inside[0] == sizes[2] and inside[-1] == sizes[3]
    assert count(folder, 10**9, sequence_length=8).count == count(folder, (ends[-1] - 1) // 8 * 8 + 1).count
    assert prepare_data.main(["--verify", f"--output_dir={folder}"]) == 0


def test_byte_level_tokens_are_counted_exactly_everywhere(tmp_path, tokenizer):
    folder = prepare(tmp_path, "gpt2", TEXTS, "--val_tokens=300")
    tokens = np.concatenate(open_split(folder, "val"))
    spelled = np.cumsum(token_byte_lengths(load_data_tokenizer(str(folder)))[tokens])
    assert [count(folder, end).count for end in range(2, 120)] == spelled[1:119].tolist()
    assert spells_text(tokenizer)


@pytest.mark.parametrize("family", ["gpt2", "t5", "bert", "clip"])
@pytest.mark.parametrize("val_tokens", [10, 150])
def test_a_split_that_ends_inside_a_document_counts_part_of_its_bytes(tmp_path, family, val_tokens):
    text = " ".join(TEXTS)
    folder = prepare(tmp_path, family, [text], f"--val_tokens={val_tokens}")
    manifest = load_manifest(folder)
    assert manifest.validation_ends_inside_document
    assert 0 < manifest.val.bytes < len(text.encode()) == manifest.val.bytes + manifest.train.bytes
    share = manifest.val.tokens / (manifest.val.tokens + manifest.train.tokens)
    assert manifest.val.bytes / len(text.encode()) == pytest.approx(share, rel=0.5)
    assert count(folder, val_tokens).count == manifest.val.bytes
    assert prepare_data.main(["--verify", f"--output_dir={folder}"]) == 0


def forget_bytes(folder):
    """Turn the folder into one from an older version."""
    (folder / TEXT_BYTES_NAME).unlink()
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["other_files"]
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("family", ["gpt2", "qwen", *CHANGING])
def test_ambiguous_spellings_give_an_estimate(tmp_path, family):
    folder = prepare(tmp_path, family, TEXTS, "--val_tokens=400")
    exact = count(folder, 300)
    forget_bytes(folder)
    spelled = count(folder, 300)
    # Gemma spells bytes without a token of their own; Qwen normalizes composed characters.
    assert spelled.is_exact == (family in ("gpt2", "gemma"))
    assert not spelled.is_exact or spelled == exact
    assert spelled.count > 0


@pytest.mark.parametrize("is_older", [False, True])
def test_runs_report_bits_per_byte_and_whether_bytes_are_estimated(tmp_path, capsys, is_older):
    folder = prepare(tmp_path, "t5", TEXTS, "--val_tokens=600")
    if is_older:
        forget_bytes(folder)
    expected = count(folder, 32 * 16 + 1, sequence_length=32)
    changes = {"max_steps": 2, "eval_every": 1, "hellaswag_every": 0, "sample_every": 0, "save_every": 1}
    assert train.main(flags(folder, tmp_path, **changes)) == 0
    assert (NOTE in capsys.readouterr().out) == is_older
    losses, bpb = (read_series(tmp_path / "run", name) for name in ("val/loss", "val/bpb"))
    for step, loss in losses.items():
        assert bpb[step] == pytest.approx(loss * 32 * 16 / math.log(2) / expected.count, rel=1e-9)
    again = {**changes, "init_from": tmp_path / "run" / "final"}
    assert train.main(["--eval_only", *flags(folder, tmp_path, **again)]) == 0
    assert (NOTE in capsys.readouterr().out) == is_older
    (entry,) = json.loads((folder / "baselines.json").read_text())
    assert entry["validation"]["val/bpb"] == pytest.approx(bpb[2], rel=1e-6)


def damage_values(path):
    counts = np.load(path)
    counts[0] += 1
    np.save(path, counts)


DAMAGES = {
    "missing": lambda path: path.unlink(),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-3]),
    "no array": lambda path: path.write_bytes(b"bytes"),
    "other type": lambda path: np.save(path, np.load(path).astype(np.float64)),
    "other counts": damage_values,
    "too few": lambda path: np.save(path, np.load(path)[:-1]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_byte_counts_give_a_one_line_error(tmp_path, capsys, damage):
    folder = prepare(tmp_path, "gpt2", TEXTS, "--val_tokens=300")
    DAMAGES[damage](folder / TEXT_BYTES_NAME)
    capsys.readouterr()
    assert prepare_data.main(["--verify", f"--output_dir={folder}"]) == 2
    assert TEXT_BYTES_NAME in capsys.readouterr().err
    assert train.main(flags(folder, tmp_path, max_steps=1, eval_tokens=64)) == 2
    error = capsys.readouterr().err
    assert TEXT_BYTES_NAME in error and error.count("\n") == 1


def test_only_shards_have_a_split_in_their_name(tmp_path):
    """build-nanogpt's loader picks shards by the split in the file name."""
    folder = prepare(tmp_path, "gpt2", TEXTS, "--val_tokens=300")
    manifest = load_manifest(folder)
    for split in ("val", "train"):
        shards = {shard.file for shard in manifest.shards if shard.split == split}
        assert {path.name for path in folder.iterdir() if split in path.name} == shards
