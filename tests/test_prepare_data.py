"""prepare_data.py from end to end: a corpus in, shards out, and a one-line error for each mistake."""

import collections
import hashlib
import json
import re
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from small_corpora import write_corpus, write_tokenizer
from tiny_tokenizers import FAMILIES
from tokenizers import pre_tokenizers
from transformers import GPT2TokenizerFast

import prepare_data
import train
from modeling_gpt2_repro.data.prepare import tokenize_stage, write_stage
from modeling_gpt2_repro.data.shards import TEXT_BYTES_NAME, load_manifest, open_split
from modeling_gpt2_repro.data.sources import local_files
from modeling_gpt2_repro.data.tokenizer import (
    GPT2_TOKENIZER,
    fingerprint_tokenizer,
    load_data_tokenizer,
    load_tokenizer,
)

EOT = 256


@pytest.fixture(scope="module")
def texts():
    """300 documents; 3 and 290 copy a validation document, 200 and 210 copy a training document."""
    words = np.random.default_rng(0).choice(["sea", "stone", "bread", "<|endoftext|>", "Ärger", "\n\n"], (300, 40))
    texts = [f"{i} " + " ".join(row[: 5 + i % 35]) for i, row in enumerate(words)]
    texts[3] = texts[1]
    texts[290] = texts[2]
    texts[200] = texts[210] = texts[100]
    return texts


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A byte-level tokenizer without merges, which loads at once."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate(alphabet)} | {"<|endoftext|>": EOT}
    tokenizer = GPT2TokenizerFast(vocab=vocabulary, merges=[])
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return load_tokenizer(str(folder))


@pytest.fixture(scope="module")
def documents(texts, tokenizer):
    """The expected ids of each document."""
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True
    encodings = [[EOT, *backend.encode(text).ids] for text in texts]
    backend.encode_special_tokens = False
    assert [len(encoding) - 1 for encoding in encodings] == [len(text.encode()) for text in texts]
    return encodings


def write_texts(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture
def corpus(tmp_path, texts):
    return write_texts(tmp_path / "corpus.jsonl", texts)


@pytest.fixture
def run(tmp_path, capsys, tokenizer):
    """Return a function that runs the script and returns its exit code, stdout and stderr."""

    def run(*flags, output_dir=tmp_path / "out", num_workers=1):
        small = ["--tokenizer", tokenizer.name_or_path]
        flags = ["--output_dir", output_dir, "--num_workers", num_workers, *small, *flags]
        code = prepare_data.main([str(flag) for flag in flags])
        return code, *capsys.readouterr()

    return run


def split_documents(folder, split):
    tokens = np.concatenate(open_split(folder, split))
    starts = np.flatnonzero(tokens == EOT)
    assert starts[0] == 0
    return [part.tolist() for part in np.split(tokens, starts[1:])]


def hash_folder(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def hash_shards(folder):
    return {name: digest for name, digest in hash_folder(folder).items() if name.endswith(".npy")}


def test_every_document_is_in_the_expected_split(run, corpus, documents, tmp_path):
    code, out, _ = run("--files", corpus, "--val_tokens", 600, "--shard_size", 3000)
    assert code == 0
    val = split_documents(tmp_path / "out", "val")
    train = split_documents(tmp_path / "out", "train")
    # Exactly the first documents of the source, up to the one that reaches 600 tokens.
    assert val == documents[: len(val)]
    assert sum(map(len, val[:-1])) < 600 <= sum(map(len, val))
    assert len(val) > 4
    # All others once, except for the copy of a validation document, in another order.
    rest = [document for document in documents[len(val) :] if document not in val]
    assert len(rest) == 300 - len(val) - 1
    assert collections.Counter(map(tuple, train)) == collections.Counter(map(tuple, rest))
    assert train != rest
    manifest = load_manifest(tmp_path / "out")
    assert (manifest.duplicates, manifest.validation_copies.documents) == (2, 1)
    assert manifest.read.tokens == sum(map(len, documents))
    assert manifest.train.tokens + manifest.val.tokens + manifest.validation_copies.tokens == manifest.read.tokens
    assert (manifest.train.documents, manifest.val.documents) == (len(train), len(val))
    sizes = [shard.tokens for shard in manifest.shards if shard.split == "train"]
    assert set(sizes[:-1]) == {3000}
    assert [shard.file for shard in manifest.shards][:2] == ["corpus_val_000000.npy", "corpus_train_000001.npy"]
    assert "dropped 1 training copy of validation documents" in out
    assert "kept 2 training documents" in out
    assert run("--verify")[0] == 0


def test_counts_bytes_of_each_split(run, corpus, texts, tmp_path):
    run("--files", corpus, "--val_tokens", 600)
    manifest = load_manifest(tmp_path / "out")
    size = [len(text.encode()) for text in texts]
    assert manifest.val.bytes == sum(size[: manifest.val.documents])
    assert manifest.read.bytes == sum(size)


def test_no_shuffle_keeps_the_source_order(run, corpus, documents, tmp_path):
    run("--files", corpus, "--val_tokens", 600, "--no_shuffle")
    val, train = (split_documents(tmp_path / "out", split) for split in ("val", "train"))
    assert val + train == [document for i, document in enumerate(documents) if i != 290]
    manifest = load_manifest(tmp_path / "out")
    assert not manifest.shuffled
    assert manifest.duplicates == 2


def write_layout(folder, texts, kind):
    """Write the same documents in the same order, in other files."""
    folder.mkdir()
    pieces = np.array_split(np.array(texts, dtype=object), 5)
    for i, piece in enumerate(pieces):
        if kind == "parquet":
            pa.parquet.write_table(pa.table({"text": list(piece)}), folder / f"{i}.parquet", row_group_size=7)
        else:
            (folder / f"{i}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in piece))


@pytest.mark.parametrize("order", [[], ["--no_shuffle"]])
def test_result_depends_on_seed_and_documents_only(run, corpus, texts, tmp_path, monkeypatch, order):
    flags = ["--val_tokens", 600, "--shard_size", 3000, *order]
    run("--files", corpus, *flags)
    expected = [np.concatenate(open_split(tmp_path / "out", split)).tolist() for split in ("val", "train")]
    for kind in ("jsonl", "parquet"):
        write_layout(tmp_path / kind, texts, kind)
    # Small limits split a small corpus into many tasks, sorted chunks and buckets.
    monkeypatch.setattr(local_files, "TASK_BYTES", 8000)
    monkeypatch.setattr(local_files, "BATCH_BYTES", 3000)
    monkeypatch.setattr(tokenize_stage, "TOKENS_PER_SORTED_CHUNK", 1500)
    monkeypatch.setattr(write_stage, "TOKENS_PER_BUCKET", 4000)
    for i, (files, num_workers) in enumerate(((corpus, 3), (tmp_path / "jsonl", 1), (tmp_path / "parquet", 2))):
        folder = tmp_path / f"out{i}"
        assert run("--files", files, *flags, output_dir=folder, num_workers=num_workers)[0] == 0
        assert [np.concatenate(open_split(folder, split)).tolist() for split in ("val", "train")] == expected
        assert load_manifest(folder).duplicates == 2


def test_another_seed_gives_another_order_of_the_same_documents(run, corpus, tmp_path):
    for seed in (1, 2):
        run("--files", corpus, "--val_tokens", 600, "--seed", seed, output_dir=tmp_path / str(seed))
    first, second = (split_documents(tmp_path / str(seed), "train") for seed in (1, 2))
    assert first != second
    assert sorted(first) == sorted(second)
    assert split_documents(tmp_path / "1", "val") == split_documents(tmp_path / "2", "val")


def compute_spectral_peak(folder, tokens_per_step):
    """Return the largest power of the share of `a`s per step, in multiples of the median power."""
    tokens = np.concatenate(open_split(folder, "train"))
    n_steps = len(tokens) // tokens_per_step
    share = (tokens[: n_steps * tokens_per_step] == ord("a") - ord("!")).reshape(n_steps, -1).mean(axis=1)
    assert 0.3 < share.mean() < 0.7
    power = np.abs(np.fft.rfft(share - share.mean())[1:]) ** 2
    return power.max() / np.median(power)


@pytest.mark.parametrize("period", [70, 600])
def test_shuffle_leaves_no_period_of_the_source_order(run, tmp_path, monkeypatch, period):
    monkeypatch.setattr(local_files, "TASK_BYTES", 8000)  # an eighth of the longer period
    # The power of noise is exponentially distributed: the largest of 300 frequencies exceeds 23 times the median with
    # a probability of 4e-5. The text makes each document distinct, which gives it its own key.
    phases = 2 * np.pi * np.arange(6000) / period
    letters = np.random.default_rng(0).random((6000, 40)) < 0.5 + 0.3 * np.sin(phases)[:, None]
    lines = [f"{number} " + "".join("ba"[letter] for letter in row) for number, row in enumerate(letters.astype(int))]
    (tmp_path / "waves.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    for order, flags in (("shuffled", []), ("in_order", ["--no_shuffle"])):
        run("--files", tmp_path / "waves.jsonl", "--val_tokens", 100, *flags, output_dir=tmp_path / order)
    assert compute_spectral_peak(tmp_path / "in_order", tokens_per_step=450) > 300
    assert compute_spectral_peak(tmp_path / "shuffled", tokens_per_step=450) < 23


def test_second_run_is_byte_identical(run, corpus, tmp_path):
    run("--files", corpus)
    before = hash_folder(tmp_path / "out")
    run("--files", corpus, "--overwrite", num_workers=2)
    assert hash_folder(tmp_path / "out") == before


def test_a_finished_folder_is_kept_or_rejected(run, corpus, tmp_path):
    run("--files", corpus)
    before = hash_folder(tmp_path / "out")
    code, out, _ = run("--files", corpus, num_workers=2)
    assert (code, "already exists" in out) == (0, True)
    code, _, err = run("--files", corpus, "--seed", 7, "--val_tokens", 100)
    assert code == 2
    assert "val_tokens" in err and "seed (was 1337, now " in err and "--overwrite" in err
    assert hash_folder(tmp_path / "out") == before
    assert run("--files", corpus, "--seed", 7, "--overwrite")[0] == 0
    with open(corpus, "a") as stream:
        stream.write('{"text": "one more"}\n')
    code, _, err = run("--files", corpus, "--seed", 7)
    assert (code, "--files changed" in err) == (2, True)


def test_a_folder_with_other_files_is_never_replaced(run, corpus, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    code, _, err = run("--files", corpus, "--overwrite")
    assert (code, "contains thesis.tex, which is not a shard" in err) == (2, True)
    assert (tmp_path / "out" / "thesis.tex").exists()


def test_max_tokens_keeps_the_shortest_prefix_and_reads_no_further(run, texts, documents, tmp_path, monkeypatch):
    write_layout(tmp_path / "files", texts[:150], "jsonl")
    (tmp_path / "files" / "4.jsonl").write_text("not JSON")
    ends = np.cumsum([len(document) for document in documents])
    monkeypatch.setattr(tokenize_stage, "TOKENS_PER_SORTED_CHUNK", 1500)
    for num_workers, max_tokens in ((1, int(ends[60])), (3, int(ends[60]) - 1)):
        folder = tmp_path / f"out{num_workers}"
        flags = ["--files", tmp_path / "files", "--max_tokens", max_tokens, "--no_shuffle", "--val_tokens", 150]
        assert run(*flags, output_dir=folder, num_workers=num_workers)[0] == 0
        assert load_manifest(folder).read.documents == 61
        assert split_documents(folder, "val") + split_documents(folder, "train") == documents[:61]
    code, _, err = run("--files", tmp_path / "files")
    assert (code, "4.jsonl, line 1" in err) == (2, True)


def test_one_long_document_is_split(run, tokenizer, tmp_path):
    text = "".join(f"Line {i} of the play, naïve and long.\n" for i in range(500))
    (tmp_path / "play.txt").write_text(text)
    code, out, _ = run("--files", tmp_path / "play.txt", "--val_tokens", 501)
    assert code == 0
    assert "ends inside a document" in out
    val, train = (np.concatenate(open_split(tmp_path / "out", split)) for split in ("val", "train"))
    assert len(val) == 501
    assert [*val, *train] == [EOT, *tokenizer(text)["input_ids"]]
    manifest = load_manifest(tmp_path / "out")
    assert manifest.val.bytes == 500
    assert manifest.val.bytes + manifest.train.bytes == len(text.encode())
    assert run("--verify")[0] == 0


@pytest.mark.parametrize("family", ["t5", "word_level", "llama", "merged_end"])
def test_no_document_can_forge_a_document_boundary(run, tmp_path, family):
    FAMILIES[family]().save_pretrained(tmp_path / "tokenizer")
    texts = [*(f"the </s> of </s></s> text {i}" for i in range(50)), "</s>", " \n", "</s> "]
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    code, _, err = run("--files", path, "--tokenizer", tmp_path / "tokenizer", "--val_tokens", 100)
    assert (code, err) == (0, "")
    manifest = load_manifest(tmp_path / "out")
    tokens = np.concatenate([*open_split(tmp_path / "out", "val"), *open_split(tmp_path / "out", "train")])
    assert manifest.read.documents + manifest.empty_documents == len(texts)
    assert np.count_nonzero(tokens == manifest.eot_id) == manifest.train.documents + manifest.val.documents >= 50
    assert run("--verify")[0] == 0


def test_empty_documents_are_skipped_and_counted(run, tmp_path):
    texts = ["first text", "", None, "second text", "third text " * 30, ""]
    pa.parquet.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    code, out, _ = run("--files", tmp_path / "a.parquet", "--val_tokens", 2)
    assert code == 0
    assert "skipped 3 empty" in out
    assert load_manifest(tmp_path / "out").empty_documents == 3
    assert load_manifest(tmp_path / "out").read.documents == 3


def test_a_separator_splits_text(run, tmp_path):
    (tmp_path / "a.txt").write_text("one\n%\ntwo two\n%\n" + "three " * 50)
    code, _, _ = run("--files", tmp_path / "a.txt", "--document_separator", "\\n%\\n", "--val_tokens", 1)
    assert code == 0
    assert load_manifest(tmp_path / "out").read.documents == 3


def test_dataset_from_a_local_folder(run, texts, documents, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    write_layout(tmp_path / "set", texts, "parquet")
    code, _, err = run("--dataset", tmp_path / "set", "--no_shuffle", "--val_tokens", 600)
    assert code == 0, err
    assert split_documents(tmp_path / "out", "val")[0] == documents[0]
    assert load_manifest(tmp_path / "out").read.documents == 300
    code, _, err = run("--dataset", tmp_path / "set", "--text_column", "story", output_dir=tmp_path / "other")
    assert (code, "no column 'story'" in err) == (2, True)


@pytest.mark.heavy
def test_built_in_corpus(run, tmp_path):
    code, _, err = run(
        "--dataset", "docstrings", "--max_tokens", "50_000", "--tokenizer", GPT2_TOKENIZER, num_workers=2
    )
    assert code == 0, err
    manifest = load_manifest(tmp_path / "out")
    assert manifest.read.tokens >= 50_000
    assert (manifest.vocab_size, manifest.eot_id) == (50257, 50256)
    assert manifest.shards[0].file == "docstrings_val_000000.npy"


def split_shown(out):
    """Return what --inspect shows of each document: split, file, position, tokens and text."""
    header = re.compile(r"--- (train|val), (\S+), position ([\d,]+), ([\d,]+) tokens ---\n")
    first, *parts = header.split(out.rpartition("\n\nfigure saved as ")[0] + "\n\n")
    shown = [(*parts[i : i + 4], parts[i + 4].removesuffix("\n\n")) for i in range(0, len(parts), 5)]
    return first, [
        (split, file, *(int(n.replace(",", "")) for n in where), text) for split, file, *where, text in shown
    ]


def test_inspect_shows_documents_and_the_manifest(run, corpus, texts, tmp_path):
    run("--files", corpus, "--val_tokens", 6000, "--shard_size", 3000)
    manifest, folder = load_manifest(tmp_path / "out"), tmp_path / "out"
    before = hash_folder(folder)
    code, out, err = run("--inspect", 40)
    assert code == 0, err
    statistics, documents = split_shown(out)
    for told in (
        f"1 files: {corpus}",
        "shuffled with seed 1337",
        "2 training documents repeat",
        "40 of 299 documents",
    ):
        assert told in statistics
    rows = {line.split("  ")[0]: line.split()[-2:] for line in statistics.splitlines()}
    for name, unit in (("tokens", "tokens"), ("documents", "documents"), ("bytes of text", "bytes")):
        assert rows[name] == [f"{getattr(totals, unit):,}" for totals in (manifest.val, manifest.train)]
    assert "by the manifest" not in statistics
    assert len(documents) == 40 == len(set(documents))
    assert {split for split, *_ in documents} == {"val", "train"}
    for split, file, position, tokens, text in documents:
        assert f"_{split}_" in file
        assert np.load(folder / file)[position] == EOT
        assert text in texts
        assert tokens == 1 + len(text.encode())
    assert hash_folder(folder) == before | {"inspection.png": hash_folder(folder)["inspection.png"]}


@pytest.mark.heavy
def test_inspect_is_repeatable_and_depends_on_the_seed(run, corpus, tmp_path):
    run("--files", corpus)
    first = (*run("--inspect", 5), hash_folder(tmp_path / "out"))
    assert (*run("--inspect", 5), hash_folder(tmp_path / "out")) == first
    other = run("--inspect", 5, "--seed", 2)[1]
    assert split_shown(other)[0] == split_shown(first[1])[0]
    assert split_shown(other)[1] != split_shown(first[1])[1]
    statistics, documents = split_shown(run("--inspect", 0)[1])
    assert documents == []
    assert split_shown(first[1])[0].startswith(statistics.rstrip())


def test_inspecting_does_not_change_the_folder(run, corpus, tmp_path):
    run("--files", corpus)
    code, out, _ = run("--verify", "--inspect", 1)
    assert (code, "match the manifest" in out, len(split_shown(out)[1])) == (0, True, 1)
    assert run("--verify")[0] == 0
    assert "already exists" in run("--files", corpus)[1]
    assert "inspect" not in load_manifest(tmp_path / "out").settings
    # Including what a killed drawing process left.
    (tmp_path / "out" / "inspection.png.partial").write_bytes(b"half")
    assert run("--files", corpus, "--overwrite", "--seed", 7)[0] == 0
    assert not list((tmp_path / "out").glob("inspection*"))


def test_inspect_reports_a_validation_split_that_ends_inside_a_document(run, tmp_path):
    (tmp_path / "play.txt").write_text("".join(f"Line {i} of the play, and long.\n" for i in range(500)))
    run("--files", tmp_path / "play.txt", "--val_tokens", 501)
    _, out, _ = run("--inspect", 9)
    statistics, documents = split_shown(out)
    assert "the last validation document continues in the training split" in statistics
    assert "train begins inside a document" in statistics
    assert "1 of 1 documents" in statistics
    assert [document[:4] for document in documents] == [("val", "play_val_000000.npy", 0, 501)]


def test_inspect_reads_other_programs_shards(run, tmp_path):
    for folder in ("npy", "bin"):
        (tmp_path / folder).mkdir()
        for split, ids in (("val", [50256, 15496, 995]), ("train", [262, 50256, 314, 1101])):
            if folder == "npy":
                np.save(tmp_path / folder / f"edufineweb_{split}_000000.npy", np.array(ids, np.uint16))
                continue
            header = np.zeros(256, "<i4")
            header[:3] = 20240520, 1, len(ids)
            content = header.tobytes() + np.array(ids, "<u2").tobytes()
            (tmp_path / folder / f"x_{split}_000000.bin").write_bytes(content)
        code, out, err = run("--inspect", 5, output_dir=tmp_path / folder)
        assert code == 0, err
        statistics, documents = split_shown(out)
        assert "no manifest: assuming ids of openai-community/gpt2" in statistics
        assert "train begins inside a document: its 1 tokens" in statistics
        assert [(split, tokens, text) for split, _, _, tokens, text in documents] == [
            ("val", 3, "Hello world"),
            ("train", 3, " I'm"),
        ]
        assert (tmp_path / folder / "inspection.png").exists()


def make_data(home, name="tok", n_documents=40):
    """Return flags for a corpus and a tokenizer, both with paths relative to `home`."""
    write_tokenizer(home / name)
    flags = ["--files", str(write_corpus(home / "corpus.jsonl", n_documents)), "--val_tokens=300", "--num_workers=1"]
    return [*flags, f"--tokenizer={name}"]


def test_a_data_folder_can_be_moved(tmp_path, monkeypatch, capsys):
    home, away = tmp_path / "home", tmp_path / "away"
    home.mkdir()
    away.mkdir()
    monkeypatch.chdir(home)
    assert prepare_data.main([*make_data(home), "--output_dir=out"]) == 0
    fingerprint = load_manifest("out").tokenizer_fingerprint
    assert load_manifest("out").tokenizer == "./tok"  # not a Hub id
    (home / "out").rename(away / "renamed")
    shutil.rmtree(home)
    monkeypatch.chdir(away)
    assert fingerprint_tokenizer(load_data_tokenizer("renamed")) == fingerprint
    assert prepare_data.main(["--output_dir=renamed", "--verify"]) == 0
    assert prepare_data.main(["--output_dir=renamed", "--inspect=2"]) == 0
    tiny = {"n_layer": 1, "n_head": 1, "n_embd": 8, "sequence_length": 8, "tokens_per_step": 64, "max_steps": 1}
    flags = [f"--{name}={value}" for name, value in tiny.items()]
    assert train.main([*flags, "--data_dir=renamed", "--plan"]) == 0
    capsys.readouterr()


def test_the_same_command_from_another_folder_finds_the_finished_data(tmp_path, monkeypatch, capsys):
    home, away = tmp_path / "home", tmp_path / "away"
    home.mkdir()
    away.mkdir()
    flags = [*make_data(home), f"--output_dir={tmp_path / 'out'}"]
    monkeypatch.chdir(home)
    assert prepare_data.main(flags) == 0
    before = hash_folder(tmp_path / "out")
    monkeypatch.chdir(away)
    assert prepare_data.main(flags) == 0
    assert prepare_data.main([*flags, "--tokenizer=../home/tok"]) == 0  # the same tokenizer by another path
    assert capsys.readouterr().out.count("already exists") == 2
    assert prepare_data.main([*flags, "--overwrite"]) == 2  # needs the tokenizer
    assert prepare_data.main([*flags, "--tokenizer=elsewhere"]) == 2
    other = json.loads((home / "tok" / "tokenizer.json").read_text())
    other["model"]["merges"].pop()
    shutil.copytree(home / "tok", away / "tok")
    (away / "tok" / "tokenizer.json").write_text(json.dumps(other))
    assert prepare_data.main(flags) == 2
    assert "the tokenizer tok changed" in capsys.readouterr().err
    assert hash_folder(tmp_path / "out") == before


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("damage", ["missing", "changed"])
def test_verify_finds_damage_to_the_tokenizer(tmp_path, capsys, file, damage):
    flags = [*make_data(tmp_path, str(tmp_path / "tok")), f"--output_dir={tmp_path / 'out'}"]
    assert prepare_data.main(flags) == 0
    path = tmp_path / "out" / "tokenizer" / file
    if damage == "missing":
        path.unlink()
    else:
        path.write_text(path.read_text() + " ")
    capsys.readouterr()
    assert prepare_data.main(["--verify", f"--output_dir={tmp_path / 'out'}"]) == 2
    reason = {"missing": "is missing", "changed": "has a different checksum"}[damage]
    assert f"tokenizer/{file} {reason}" in capsys.readouterr().err
    assert prepare_data.main([*flags, "--overwrite"]) == 0
    assert prepare_data.main(["--verify", f"--output_dir={tmp_path / 'out'}"]) == 0


def test_a_folder_from_an_older_version_loads_its_tokenizer_by_name(tmp_path, capsys):
    flags = [*make_data(tmp_path, str(tmp_path / "tok")), f"--output_dir={tmp_path / 'out'}"]
    assert prepare_data.main(flags) == 0
    shutil.rmtree(tmp_path / "out" / "tokenizer")
    (tmp_path / "out" / TEXT_BYTES_NAME).unlink()
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    del manifest["other_files"]
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))
    assert prepare_data.main(flags) == 0
    assert prepare_data.main(["--verify", f"--output_dir={tmp_path / 'out'}"]) == 0
    assert len(load_data_tokenizer(str(tmp_path / "out"))) == 300
    (tmp_path / "tok").rename(tmp_path / "out" / "tokenizer")  # as the error for a missing tokenizer suggests
    assert len(load_data_tokenizer(str(tmp_path / "out"))) == 300
    assert prepare_data.main([*flags, "--overwrite", f"--tokenizer={tmp_path / 'out' / 'tokenizer'}"]) == 0
    assert not list(tmp_path.glob("out?*"))
    capsys.readouterr()


def test_a_users_tokenizer_is_not_overwritten(tmp_path, capsys):
    flags = make_data(tmp_path, str(tmp_path / "out" / "tokenizer"))
    for overwrite in ([], ["--overwrite"]):
        assert prepare_data.main([*flags, f"--output_dir={tmp_path / 'out'}", *overwrite]) == 2
        assert "contains tokenizer, which is not a shard" in capsys.readouterr().err
    assert (tmp_path / "out" / "tokenizer" / "tokenizer.json").exists()


def remove_tokenizer(folder, manifest):
    shutil.rmtree(folder / "tokenizer")
    manifest["tokenizer"] = "no-such-user/no-such-tokenizer"


def damage_tokenizer(folder, manifest):
    path = folder / "tokenizer" / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:-9])


def change_fingerprint(folder, manifest):
    manifest["tokenizer_fingerprint"] = "sha256:0"


def truncate_shard(folder, manifest):
    path = folder / "corpus_train_000001.npy"
    path.write_bytes(path.read_bytes()[:-2])


def write_foreign_id(folder, manifest):
    tokens = np.load(folder / "corpus_train_000001.npy", mmap_mode="r+")
    tokens[77] = EOT + 1


def leave_unfinished(folder, manifest):
    (folder / "unfinished").mkdir()


def block_picture(folder, manifest):
    (folder / "inspection.png").mkdir()


def remove_shards(folder, manifest):
    manifest["shards"] = []
    nothing = {"documents": 0, "tokens": 0, "bytes": 0}
    manifest |= dict.fromkeys(("read", "train", "val", "validation_copies"), nothing)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (remove_tokenizer, "cannot load the tokenizer 'no-such-user/no-such-tokenizer'|cannot reach the Hub"),
        (damage_tokenizer, r"contains no tokenizer.*: restore .* as .*/tokenizer, or prepare the data again"),
        (change_fingerprint, "is not the one that"),
        (truncate_shard, "corpus_train_000001.npy is not a complete .npy file"),
        (
            write_foreign_id,
            "corpus_train_000001.npy has 1 ids beyond the vocabulary of 257, the first, 257, at pos.* 77",
        ),
        (leave_unfinished, "unfinished"),
        (block_picture, r"cannot write .*inspection\.png"),
        (remove_shards, "has no train shards"),
    ],
)
def test_a_folder_that_cannot_be_inspected_gives_one_line(run, corpus, tmp_path, damage, reason):
    run("--files", corpus)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    damage(tmp_path / "out", manifest)
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))
    code, _, err = run("--inspect", 2)
    assert code == 2
    assert re.search(reason, err)
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "out" / "inspection.png").is_file()


def test_inspect_reports_differences_from_the_manifest(run, corpus, tmp_path):
    run("--files", corpus)
    tokens = np.load(tmp_path / "out" / "corpus_train_000001.npy", mmap_mode="r+")
    tokens[np.flatnonzero(tokens == EOT)[5]] = 3
    tokens.flush()
    documents = load_manifest(tmp_path / "out").train.documents
    assert (
        f"train has {documents:,} documents according to the manifest: check with --verify" in run("--inspect", 0)[1]
    )


def make_bad(name, content):
    def make(folder):
        (folder / name).write_bytes(content)
        return ["--files", folder / name]

    return make


BAD_INPUTS = {
    "missing file": (lambda folder: ["--files", folder / "none.jsonl"], "no such file"),
    "missing column": (make_bad("a.jsonl", b'{"body": "a"}\n'), "--text_column one of body"),
    "corrupt line": (make_bad("a.jsonl", b'{"text": "a"}\n{"text": \n'), "line 2"),
    "corrupt parquet": (make_bad("a.parquet", b"PAR1"), "not a complete parquet"),
    "corrupt gzip": (make_bad("a.txt.gz", b"\x1f\x8b\x08\x00"), "a.txt.gz is damaged"),
    "invalid UTF-8": (make_bad("a.txt", b"\xff" * 99), "a.txt is not valid UTF-8"),
    "empty corpus": (make_bad("a.txt", b""), "the corpus is empty"),
    "too small": (make_bad("a.txt", b"word"), "too few"),
    "only duplicates": (make_bad("a.jsonl", b'{"text": "a a a a a"}\n' * 20), "no training documents are left"),
    "unreachable Hub": (lambda folder: [], "cannot reach the Hub"),
    "unknown tokenizer": (
        lambda folder: [*make_bad("a.txt", b"a b c" * 99)(folder), "--tokenizer", "x/y"],
        "tokenizer 'x/y'",
    ),
    "foreign flag": (lambda folder: ["--num_proc", "4"], "--num_workers"),
    "bad number": (lambda folder: ["--shard_size", "0"], "--shard_size must be 1 or more"),
    "empty separator": (lambda folder: ["--document_separator="], "--document_separator is empty"),
    "nothing to verify": (lambda folder: ["--verify"], "there is no data folder"),
    "nothing to inspect": (lambda folder: ["--inspect", "3"], "there is no data folder"),
    "negative document count": (lambda folder: ["--inspect", "-1"], "--inspect must be 0 or more, not -1"),
}


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_input_gives_one_line_and_leaves_nothing(run, tmp_path, case, num_workers):
    make, reason = BAD_INPUTS[case]
    (tmp_path / "in").mkdir()
    code, _, err = run(*make(tmp_path / "in"), num_workers=num_workers)
    assert code == 2
    assert reason in err
    lines = [line for line in err.splitlines() if "error:" in line]
    assert len(lines) == 1
    assert "Traceback" not in err
    # Finished pieces stay; in these three cases only the corpus as a whole is invalid.
    kept = ["out.partial"] if case in ("empty corpus", "too small", "only duplicates") else []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", *kept]
    assert ("finished pieces are kept" in err) == bool(kept)


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_windows_text_is_split_like_unix_text(run, tmp_path, texts, mark):
    texts = [text.replace("\n", " ") for text in texts]
    for name, end in (("unix", "\n"), ("windows", "\r\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_bytes(mark + (2 * end).join(texts).encode())
        flags = ("--files", tmp_path / name / "a.txt", "--document_separator", "\\n\\n", "--val_tokens", 600)
        code, out, _ = run(*flags, output_dir=tmp_path / f"{name}.out")
        assert code == 0 and "read 300 documents" in out and "--document_separator" not in out
    assert hash_shards(tmp_path / "unix.out") == hash_shards(tmp_path / "windows.out")


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({"a.txt": "a b\nc", "b.txt": ""}, "was not found"),
        ({"a.txt": "a b\nc", "b.txt": "b\n\nc"}, None),
        ({"a.txt": "a b\n\n"}, None),
        ({"a.jsonl": '{"text": "a b"}'}, "there are none"),
        ({"a.jsonl": '{"text": "a b"}', "b.txt": "a"}, None),
    ],
)
def test_a_separator_without_matches_is_reported(run, tmp_path, files, complaint):
    (tmp_path / "in").mkdir()
    for name, text in files.items():
        (tmp_path / "in" / name).write_text(text)
    code, out, _ = run("--files", tmp_path / "in", "--document_separator", r"\n\n", "--val_tokens", 1)
    assert code == 0
    lines = [line for line in out.splitlines() if "--document_separator" in line]
    assert len(lines) == (complaint is not None) and all(complaint in line for line in lines)
