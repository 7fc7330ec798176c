"""prepare_data.py as people run it: corpus in, shards out, and one line for each mistake."""

import collections
import hashlib
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from tokenizers import pre_tokenizers
from transformers import GPT2TokenizerFast

import prepare_data
from modeling_gpt2_repro.data import local_files, splits, tokenized
from modeling_gpt2_repro.data.shards import load_manifest, open_split
from modeling_gpt2_repro.data.tokenization import GPT2_TOKENIZER, load_tokenizer

EOT = 256


@pytest.fixture(scope="module")
def texts():
    """300 documents; 3 and 290 copy a validation document, 200 and 210 a training document."""
    words = np.random.default_rng(0).choice(["sea", "stone", "bread", "<|endoftext|>", "Ärger", "\n\n"], (300, 40))
    texts = [f"{i} " + " ".join(row[: 5 + i % 35]) for i, row in enumerate(words)]
    texts[3] = texts[1]
    texts[290] = texts[2]
    texts[200] = texts[210] = texts[100]
    return texts


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A byte-level tokenizer without merges: a run with it starts at once."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate(alphabet)} | {"<|endoftext|>": EOT}
    tokenizer = GPT2TokenizerFast(vocab=vocabulary, merges=[])
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return load_tokenizer(str(folder))


@pytest.fixture(scope="module")
def documents(texts, tokenizer):
    """The ids that each document has to have."""
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True
    encodings = [[EOT, *backend.encode(text).ids] for text in texts]
    backend.encode_special_tokens = False
    assert [len(encoding) - 1 for encoding in encodings] == [len(text.encode()) for text in texts]
    return encodings


@pytest.fixture
def corpus(tmp_path, texts):
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture
def run(tmp_path, capsys, tokenizer):
    """Run the script; return its exit code, stdout and stderr."""

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
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def hash_shards(folder):
    return {name: digest for name, digest in hash_folder(folder).items() if name.endswith(".npy")}


def test_every_document_goes_where_it_belongs(run, corpus, documents, tmp_path):
    code, out, _ = run("--files", corpus, "--val_tokens", 600, "--shard_size", 3000)
    assert code == 0
    val = split_documents(tmp_path / "out", "val")
    train = split_documents(tmp_path / "out", "train")
    # The exact front of the source order, ending with the document that reaches 600 tokens.
    assert val == documents[: len(val)]
    assert sum(map(len, val[:-1])) < 600 <= sum(map(len, val))
    assert len(val) > 4
    # Everything else once, but for the copy of a validation document, in another order.
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
    assert "left out 1 training copies" in out
    assert "kept 2 training documents that repeat" in out
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
    """The same documents in the same order, in other files."""
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
    # Small limits make many tasks, runs and buckets out of a small corpus.
    monkeypatch.setattr(local_files, "TASK_BYTES", 8000)
    monkeypatch.setattr(local_files, "BATCH_BYTES", 3000)
    monkeypatch.setattr(tokenized, "TOKENS_PER_RUN", 1500)
    monkeypatch.setattr(splits, "TOKENS_PER_BUCKET", 4000)
    for i, (files, num_workers) in enumerate(((corpus, 3), (tmp_path / "jsonl", 1), (tmp_path / "parquet", 2))):
        folder = tmp_path / f"out{i}"
        assert run("--files", files, *flags, output_dir=folder, num_workers=num_workers)[0] == 0
        assert [np.concatenate(open_split(folder, split)).tolist() for split in ("val", "train")] == expected
        assert load_manifest(folder).duplicates == 2


def test_another_seed_gives_another_order_of_the_same(run, corpus, tmp_path):
    for seed in (1, 2):
        run("--files", corpus, "--val_tokens", 600, "--seed", seed, output_dir=tmp_path / str(seed))
    first, second = (split_documents(tmp_path / str(seed), "train") for seed in (1, 2))
    assert first != second
    assert sorted(first) == sorted(second)
    assert split_documents(tmp_path / "1", "val") == split_documents(tmp_path / "2", "val")


def compute_spectral_peak(folder, tokens_per_step):
    """Return the largest power of the share of `a`s a step, in multiples of the median power."""
    tokens = np.concatenate(open_split(folder, "train"))
    n_steps = len(tokens) // tokens_per_step
    share = (tokens[: n_steps * tokens_per_step] == ord("a") - ord("!")).reshape(n_steps, -1).mean(axis=1)
    assert 0.3 < share.mean() < 0.7
    power = np.abs(np.fft.rfft(share - share.mean())[1:]) ** 2
    return power.max() / np.median(power)


@pytest.mark.parametrize("period", [70, 600])
def test_shuffle_leaves_no_period_of_the_source_order(run, tmp_path, monkeypatch, period):
    monkeypatch.setattr(local_files, "TASK_BYTES", 8000)  # an eighth of the longer period
    # Power of noise is exponentially distributed: of 300 frequencies the largest has 23 times the median with a
    # probability of 4e-5. The text tells each document from the others, so that it has a key of its own.
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


def test_finished_folder_is_kept_or_refused(run, corpus, tmp_path):
    run("--files", corpus)
    before = hash_folder(tmp_path / "out")
    code, out, _ = run("--files", corpus, num_workers=2)
    assert (code, "already there" in out) == (0, True)
    code, _, err = run("--files", corpus, "--seed", 7, "--val_tokens", 100)
    assert code == 2
    assert "val_tokens" in err and "seed (1337 there)" in err and "--overwrite" in err
    assert hash_folder(tmp_path / "out") == before
    assert run("--files", corpus, "--seed", 7, "--overwrite")[0] == 0
    with open(corpus, "a") as stream:
        stream.write('{"text": "one more"}\n')
    code, _, err = run("--files", corpus, "--seed", 7)
    assert (code, "--files were others" in err) == (2, True)


def test_never_replaces_a_folder_of_other_things(run, corpus, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    code, _, err = run("--files", corpus, "--overwrite")
    assert (code, "something else than shards" in err) == (2, True)
    assert (tmp_path / "out" / "thesis.tex").exists()


def test_max_tokens_keeps_the_shortest_prefix_and_reads_no_further(run, texts, documents, tmp_path, monkeypatch):
    write_layout(tmp_path / "files", texts[:150], "jsonl")
    (tmp_path / "files" / "4.jsonl").write_text("not JSON")
    ends = np.cumsum([len(document) for document in documents])
    monkeypatch.setattr(tokenized, "TOKENS_PER_RUN", 1500)
    for num_workers, max_tokens in ((1, int(ends[60])), (3, int(ends[60]) - 1)):
        folder = tmp_path / f"out{num_workers}"
        flags = ["--files", tmp_path / "files", "--max_tokens", max_tokens, "--no_shuffle", "--val_tokens", 150]
        assert run(*flags, output_dir=folder, num_workers=num_workers)[0] == 0
        assert load_manifest(folder).read.documents == 61
        assert split_documents(folder, "val") + split_documents(folder, "train") == documents[:61]
    code, _, err = run("--files", tmp_path / "files")
    assert (code, "4.jsonl, line 1" in err) == (2, True)


def test_one_long_document_is_cut(run, tokenizer, tmp_path):
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


def test_empty_documents_are_skipped_and_counted(run, tmp_path):
    texts = ["first text", "", None, "second text", "third text " * 30, ""]
    pa.parquet.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    code, out, _ = run("--files", tmp_path / "a.parquet", "--val_tokens", 2)
    assert code == 0
    assert "skipped 3 empty" in out
    assert load_manifest(tmp_path / "out").empty_documents == 3
    assert load_manifest(tmp_path / "out").read.documents == 3


def test_separator_cuts_text(run, tmp_path):
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


def test_built_in_corpus(run, tmp_path):
    code, _, err = run(
        "--dataset", "docstrings", "--max_tokens", "50_000", "--tokenizer", GPT2_TOKENIZER, num_workers=2
    )
    assert code == 0, err
    manifest = load_manifest(tmp_path / "out")
    assert manifest.read.tokens >= 50_000
    assert (manifest.vocab_size, manifest.eot_id) == (50257, 50256)
    assert manifest.shards[0].file == "docstrings_val_000000.npy"


def make_bad(name, content):
    def make(folder):
        (folder / name).write_bytes(content)
        return ["--files", folder / name]

    return make


BAD_INPUTS = {
    "missing file": (lambda folder: ["--files", folder / "none.jsonl"], "no such file"),
    "missing column": (make_bad("a.jsonl", b'{"body": "a"}\n'), "--text_column one of body"),
    "corrupt line": (make_bad("a.jsonl", b'{"text": "a"}\n{"text": \n'), "line 2"),
    "corrupt parquet": (make_bad("a.parquet", b"PAR1"), "not a whole parquet"),
    "corrupt gzip": (make_bad("a.txt.gz", b"\x1f\x8b\x08\x00"), "a.txt.gz is damaged"),
    "invalid UTF-8": (make_bad("a.txt", b"\xff" * 99), "a.txt is not valid UTF-8"),
    "empty corpus": (make_bad("a.txt", b""), "the corpus is empty"),
    "too small": (make_bad("a.txt", b"word"), "too few"),
    "only copies": (make_bad("a.jsonl", b'{"text": "a a a a a"}\n' * 20), "nothing is left for training"),
    "unreachable Hub": (lambda folder: [], "cannot reach the Hub"),
    "unknown tokenizer": (
        lambda folder: [*make_bad("a.txt", b"a b c" * 99)(folder), "--tokenizer", "x/y"],
        "tokenizer 'x/y'",
    ),
    "other flag": (lambda folder: ["--num_proc", "4"], "--num_workers"),
    "bad number": (lambda folder: ["--shard_size", "0"], "at least 1"),
    "nothing to verify": (lambda folder: ["--verify"], "there is no data folder"),
}


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_input_is_one_line_and_leaves_nothing(run, tmp_path, case, num_workers):
    make, reason = BAD_INPUTS[case]
    (tmp_path / "in").mkdir()
    code, _, err = run(*make(tmp_path / "in"), num_workers=num_workers)
    assert code == 2
    assert reason in err
    lines = [line for line in err.splitlines() if "error:" in line]
    assert len(lines) == 1
    assert "Traceback" not in err
    # Only what was finished stays: in these three cases it is the corpus as a whole that does not do.
    kept = ["out.partial"] if case in ("empty corpus", "too small", "only copies") else []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", *kept]
    assert ("finished pieces are kept" in err) == bool(kept)
