"""prepare_data.py on Hub datasets: a fake Hub, and processes that use it as their only Hub."""

import gzip
import io
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from conftest import REPOSITORY
from fork_server import serve_forks
from loopback_hub import LoopbackHub, User
from test_prepare_data import hash_folder, hash_shards, split_documents, tokenizer  # noqa: F401

import prepare_data
from modeling_gpt2_repro.data.shards import load_manifest

FINEWEB_EDU = "datasets/HuggingFaceFW/fineweb-edu"
# The same documents as JSON Lines; the dataset's name gives the shards the same names.
LINES = "datasets/org/edufineweb"
MEMBER, STRANGER = "hf_member0123456789", "hf_stranger0123456789"

CARD = b"""---
configs:
- config_name: default
  data_files: [{split: train, path: data/*}]
- config_name: sample-10BT
  data_files: [{split: train, path: sample/10BT/*}]
- config_name: damaged
  data_files: [{split: train, path: damaged/*}]
- config_name: uneven
  data_files: [{split: train, path: uneven/*}]
dataset_info:
- config_name: sample-10BT
  features:
  - {name: id, dtype: string}
  - {name: image, dtype: binary}
  - {name: text, dtype: string}
  - {name: score, dtype: float64}
  splits: [{name: train, num_bytes: 36000000, num_examples: 90}]
---
"""


@pytest.fixture(scope="module")
def texts():
    generator = np.random.default_rng(0)
    return [f"{i} " + " ".join(map(str, generator.integers(0, 10**6, 5 + i % 35))) for i in range(90)]


def write_parquet(texts, fat_bytes=0, row_group_size=10) -> bytes:
    """Return a Parquet file in row groups, with `fat_bytes` of another column per document."""
    generator = np.random.default_rng(1)
    columns = {
        "id": [str(i) for i in range(len(texts))],
        "image": [generator.bytes(fat_bytes) for _ in texts],
        "text": texts,
        "score": [0.5] * len(texts),
    }
    stream = io.BytesIO()
    pa.parquet.write_table(pa.table(columns), stream, row_group_size=row_group_size)
    return stream.getvalue()


def write_lines(texts) -> bytes:
    return gzip.compress("".join(json.dumps({"url": "x", "text": text}) + "\n" for text in texts).encode())


@pytest.fixture(scope="module")
def hub(texts):
    """A Hub with `HuggingFaceFW/fineweb-edu` in files of 30 documents each, and faulty, gated and private datasets."""
    with LoopbackHub() as hub:
        hub.users = {MEMBER: User("member"), STRANGER: User("stranger")}
        thirds = [texts[i : i + 30] for i in (0, 30, 60)]
        hub.commit(
            FINEWEB_EDU,
            {
                "README.md": CARD,
                "data/0.parquet": write_parquet(texts[:5]),
                **{f"sample/10BT/{i:03}.parquet": write_parquet(thirds[i], 400_000) for i in range(3)},
                "damaged/0.parquet": write_parquet(thirds[0]),
                "damaged/1.parquet": write_parquet(thirds[1])[:-9],
                "uneven/0.parquet": write_parquet(thirds[0]),
                "uneven/1.parquet": write_parquet(thirds[1]).replace(b"text", b"body"),
            },
        )
        hub.commit(LINES, {"train-0.jsonl.gz": write_lines(texts[:50])})
        hub.tag(LINES, "v1")
        hub.commit(LINES, {f"train-{i}.jsonl.gz": write_lines(thirds[i]) for i in range(3)})
        hub.commit(LINES, {"train-0.jsonl.gz": write_lines(texts[:70])}, branch="next")
        for name in ("gated", "private"):
            hub.commit(f"datasets/org/{name}", {"train.jsonl.gz": write_lines(texts)})
            setattr(hub.repositories[f"datasets/org/{name}"], name, True)
            hub.repositories[f"datasets/org/{name}"].readers = {MEMBER}
        hub.commit("datasets/org/empty", {"README.md": b"---\nlicense: mit\n---\nNothing yet."})
        hub.commit("datasets/org/many", {f"train-{i}.parquet": write_parquet(texts) for i in range(8)})
        hub.commit("datasets/org/long", {"train.parquet": write_parquet(list(map(str, range(40960))), 2000, 1024)})
        yield hub


@pytest.fixture(autouse=True)
def _healthy(hub):
    hub.start()
    hub.heal()
    hub.requests.clear()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def environment(hub, home):
    return {**os.environ, **hub.environment(home), "PYTHONPATH": str(REPOSITORY)}


@pytest.fixture(scope="module")
def server(environment):
    with serve_forks(["datasets", "prepare_data"], environment) as server:
        yield server


@pytest.fixture
def run(server, tmp_path, tokenizer):  # noqa: F811
    """Return a function that runs the script in a separate process."""

    def run(*flags, output_dir=tmp_path / "out", num_workers=1, token="", script=""):
        argv = [
            "--output_dir",
            output_dir,
            "--num_workers",
            num_workers,
            *flags,
            "--tokenizer",
            tokenizer.name_or_path,
        ]
        return server.run("prepare_data", argv, tmp_path, {"HF_TOKEN": token}, script)

    return run


@pytest.fixture(scope="module")
def expected(texts, tokenizer, tmp_path_factory):  # noqa: F811
    """The shards of the same documents from one local file, named to give the shards the same names."""
    folder = tmp_path_factory.mktemp("local")
    (folder / "edufineweb.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    flags = ["--files", folder / "edufineweb.jsonl", "--output_dir", folder / "out", "--num_workers", 1]
    assert prepare_data.main([*map(str, flags), "--tokenizer", tokenizer.name_or_path]) == 0
    return hash_shards(folder / "out")


def check_is_one_line(result, reason):
    assert result.code == 2, result.err
    retries = ("thrown while requesting", "Retrying in ")  # messages of `huggingface_hub` between retries
    lines = [line for line in result.err.splitlines() if not any(words in line for words in retries)]
    assert len(lines) == 1, result.err
    assert lines[0].startswith("prepare_data.py: error: ")
    assert reason in lines[0]
    assert result.seconds < 20


@pytest.mark.usefixtures("server")  # starts at the same time
def test_plain_command_writes_default_dataset(hub, environment, home, expected, tokenizer, tmp_path):  # noqa: F811
    """Run the unmodified script with two workers: it downloads only the text column, and leaves only shards behind."""
    command = [sys.executable, "prepare_data.py", "--output_dir", tmp_path / "out", "--num_workers", "2"]
    result = subprocess.run(
        [*command, "--tokenizer", tokenizer.name_or_path],
        env=environment,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert hash_shards(tmp_path / "out") == expected
    assert "edufineweb_val_000000.npy" in expected
    sha = hub.repositories[FINEWEB_EDU].resolve("main")
    source = {"id": "HuggingFaceFW/fineweb-edu", "config": "sample-10BT", "split": "train", "revision": sha}
    assert load_manifest(tmp_path / "out").source == source
    for path in (f"sample/10BT/{i:03}.parquet" for i in range(3)):
        assert 0 < hub.count_bytes(path) < len(hub.get_file(FINEWEB_EDU, path)) / 3
    kept = {path: path.stat().st_size for path in home.rglob("*") if path.is_file() and not path.is_symlink()}
    assert sum(kept.values()) < 2000, kept


@pytest.mark.parametrize("num_workers", [1, 2])
def test_files_and_workers_do_not_change_the_shards(run, expected, tmp_path, num_workers):
    result = run("--dataset", "org/edufineweb", num_workers=num_workers)
    assert result.code == 0, result.err
    assert hash_shards(tmp_path / "out") == expected
    if num_workers == 1:
        assert run(output_dir=tmp_path / "other").code == 0
        assert hash_shards(tmp_path / "other") == expected


def test_revision_becomes_the_commit(run, hub, texts, tmp_path):
    references = hub.repositories[LINES].references
    for revision, sha, n_documents in (
        ("next", references["next"], 70),
        ("v1", references["v1"], 50),
        (references["v1"], references["v1"], 50),
    ):
        folder = tmp_path / revision
        result = run("--dataset", "org/edufineweb", "--revision", revision, output_dir=folder)
        assert result.code == 0, result.err
        manifest = load_manifest(folder)
        assert manifest.source["revision"] == sha
        assert manifest.read.documents == n_documents


def test_max_tokens_leaves_the_rest_unread(run, hub, texts, tokenizer, tmp_path):  # noqa: F811
    result = run("--max_tokens", 500, "--val_tokens", 100, "--no_shuffle")
    assert result.code == 0, result.err
    n_read = load_manifest(tmp_path / "out").read.documents
    read = split_documents(tmp_path / "out", "val") + split_documents(tmp_path / "out", "train")
    assert [tokenizer.decode(document[1:]) for document in read] == texts[:n_read]
    assert n_read < 10
    assert hub.count_requests("001.parquet") == hub.count_requests("002.parquet") == 0
    # Nor does it read all of a file's 40 row groups; Arrow reads a few ahead, on a busy machine about ten.
    assert run("--dataset", "org/long", "--max_tokens", 500, output_dir=tmp_path / "long").code == 0
    assert hub.count_bytes("train.parquet") < len(hub.get_file("datasets/org/long", "train.parquet")) / 4


def test_a_finished_folder_is_recognized_without_the_hub(run, hub, tmp_path):
    assert run("--dataset", "org/edufineweb").code == 0
    before = hash_folder(tmp_path / "out")
    hub.stop()
    result = run("--dataset", "org/edufineweb")
    assert (result.code, "already exists" in result.out) == (0, True)
    check_is_one_line(run(), "dataset_name (was org/edufineweb, now ")
    assert hash_folder(tmp_path / "out") == before


MISTAKES = {
    "column": (["--text_column", "story"], "--text_column one of id, image, text, score"),
    "column of lines": (["--dataset=org/edufineweb", "--text_column=story"], "--text_column one of url, text"),
    "kind of column": (["--text_column", "score"], "contains double, not strings"),
    "dataset": (["--dataset", "org/none"], "the Hub has no dataset 'org/none'"),
    "name": (
        ["--dataset", "org/none/at/all"],
        "'org/none/at/all' is neither a local folder nor a valid Hub id",
    ),
    "config": (["--dataset_config_name", "sample-1T"], "'sample-10BT'"),
    "split": (["--split", "test"], "Available splits: ['train'] (see --split)"),
    "revision": (["--revision", "v9"], "the dataset 'HuggingFaceFW/fineweb-edu' has no such --revision"),
    "no files": (["--dataset", "org/empty"], "org/empty"),
    "gated": (["--dataset", "org/gated"], "'org/gated' is gated: accept its terms on the Hub and run `hf auth login`"),
    "private": (["--dataset", "org/private"], "if it is private: run `hf auth login`"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_gives_one_line_and_leaves_nothing(run, tmp_path, case):
    flags, reason = MISTAKES[case]
    check_is_one_line(run(*flags), reason)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stderr", "stdout"]


def test_tokens_grant_access_and_are_never_shown(run, tmp_path):
    for name in ("gated", "private"):
        result = run("--dataset", f"org/{name}", output_dir=tmp_path / name, token=MEMBER)
        assert result.code == 0, result.err
        assert MEMBER not in result.out + result.err + (tmp_path / name / "manifest.json").read_text()
        assert load_manifest(tmp_path / name).shards[0].file == f"{name}_val_000000.npy"
    check_is_one_line(run("--dataset", "org/gated", token=STRANGER), "is gated: accept its terms")
    check_is_one_line(run("--dataset", "org/private", token=STRANGER), "the Hub has no dataset 'org/private'")
    result = run(token="hf_expired0123456789")
    check_is_one_line(result, "error: the dataset 'HuggingFaceFW/fineweb-edu': the Hub denied access (401")
    assert "hf_expired" not in result.err


def test_unreachable_hub_is_noticed_at_once(run, hub):
    hub.stop()
    result = run()
    check_is_one_line(result, "cannot reach the Hub for the dataset 'HuggingFaceFW/fineweb-edu'")
    assert result.seconds < 3


def test_transient_errors_of_the_hub_are_retried(run, hub, expected, tmp_path):
    hub.fail("/api/datasets/HuggingFaceFW/fineweb-edu", "503", times=2)
    hub.fail("README.md", "500", times=2)
    hub.fail("/tree/", "429", times=1)
    hub.fail("000.parquet", "500", times=3)
    hub.fail("001.parquet", "reset", times=3)
    hub.fail("002.parquet", "504", times=1)
    result = run(num_workers=2)
    assert result.code == 0, result.err
    assert hash_shards(tmp_path / "out") == expected


@pytest.mark.parametrize("num_workers, failure", [(2, "500"), (2, "reset"), (1, "gone")])
def test_a_hub_failure_during_a_run_keeps_finished_pieces(run, hub, expected, tmp_path, num_workers, failure):
    hub.fail("002.parquet", failure)
    result = run(num_workers=num_workers)
    check_is_one_line(result, "the dataset 'HuggingFaceFW/fineweb-edu', file 3 of 3 (sample/10BT/002.parquet): the ")
    assert "2 finished pieces are kept: the same command resumes" in result.err
    assert hub.count_requests("002.parquet") < 20
    hub.start()
    hub.heal()
    hub.requests.clear()
    # The finished pieces belong to the commit that main pointed to at the start.
    first_commit = hub.repositories[FINEWEB_EDU].references["main"]
    hub.commit(FINEWEB_EDU, {"README.md": CARD + b"\nA dataset.\n"})
    try:
        result = run(num_workers=num_workers)
    finally:
        hub.repositories[FINEWEB_EDU].references["main"] = first_commit
    assert result.code == 0, result.err
    assert "2 pieces finished" in result.out
    assert hash_shards(tmp_path / "out") == expected
    assert load_manifest(tmp_path / "out").source["revision"] == first_commit
    assert hub.count_requests("001.parquet") == 0


def test_no_file_is_started_after_one_has_failed(run, hub):
    hub.fail("train-1.parquet", "403")
    for i in range(2, 8):
        hub.fail(f"train-{i}.parquet", "slow")
    result = run("--dataset", "org/many", num_workers=2)
    check_is_one_line(result, "file 2 of 8 (train-1.parquet): the Hub denied access (403 Forbidden)")
    assert hub.count_requests("train-0.parquet") > 0
    assert hub.count_requests("train-4.parquet") == hub.count_requests("train-5.parquet") == 0


def test_a_cached_copy_is_not_used_instead_of_the_hub(run, hub, home):
    script = "import datasets; datasets.load_dataset('org/gated')"
    assert run(script=script, token=MEMBER).code == 0
    hub.fail("README.md", "500")
    try:
        result = run("--dataset", "org/gated", token=MEMBER)
    finally:
        shutil.rmtree(home / "datasets")
    check_is_one_line(result, "the dataset 'org/gated': the connection to the Hub failed")


def test_a_worker_keeps_only_part_of_a_file_in_memory(run, hub):
    """Read 64 MB of text in row groups of 1 MB each."""
    words = np.random.default_rng(0).integers(10**7, 10**8, 2**23).astype("S8").tobytes().decode()
    texts = [words[i : i + 2**11] for i in range(0, 2**26, 2**11)]
    hub.commit("datasets/org/large", {"train.parquet": write_parquet(texts, row_group_size=2**9)})
    script = """
from modeling_gpt2_repro.data.sources.corpus import build_hub_corpus
def read_memory(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) // 1024
[task] = build_hub_corpus("org/large", None, "train", None, "text").tasks
before = read_memory("RssAnon")
most, size = 0, 0
for batch in task.read_batches():
    size += batch.nbytes
    most = max(most, read_memory("RssAnon") - before)
assert size >= 2**26, size
print(most)
"""
    result = run(script=script)
    assert result.code == 0, result.err
    assert int(result.out) < 40


@pytest.mark.parametrize("config, num_workers", [("damaged", 1), ("uneven", 2)])
def test_a_damaged_file_is_reported(run, config, num_workers):
    result = run("--dataset_config_name", config, num_workers=num_workers)
    check_is_one_line(result, f"file 2 of 2 ({config}/1.parquet): ")
    assert "1 finished pieces are kept" in result.err
