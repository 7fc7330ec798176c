"""Each benchmark at a tiny size: it runs to its end and writes a file of results."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

from benchmarks import bench_prepare_data, tokenizer_peers
from benchmarks.bench_determinism import find_median_interval
from benchmarks.corpora import count_words, write_new_words, write_zipfian
from benchmarks.measurements import Figure, read_results

FAST = {
    "checkpoint": "--model_size=toy --rounds=1",
    "loss": "--tokens=256 --n_embd=8 --rounds=1",
    "reading": "--shards=2 --shard_tokens=2e5 --rounds=1",
}
SLOW = {
    "determinism": "--model_size=toy --sequence_length=32 --rounds=2 --compile=off",
    "hellaswag": "--items=2 --rounds=1",
    "model": "--model_size=toy --sequence_length=32 --rounds=1 --modes eager",
    "plots": "--steps=300 --rounds=1",
    "prepare_data_memory": "--tokens=1e5 --texts zipfian",
    "publishing": "--model_size=toy --checkpoints=1",
    "tracking": "--steps=5",
    "training_step": "--model_size=toy --sequence_length=32 --rounds=1 --peers train.py",
}


def run(name: str, flags: str, output: Path) -> list[Figure]:
    """Run a benchmark and return its figures."""
    command = [sys.executable, f"benchmarks/bench_{name}.py", *flags.split(), f"--output={output}"]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    content, figures, _ = read_results(output)
    assert content["benchmark"] == name
    assert content["command"] == f"python benchmarks/bench_{name}.py {flags}"
    assert figures and all(figure.unit and figure.value >= 0 for figure in figures)
    return figures


@pytest.mark.parametrize("name", FAST)
def test_a_benchmark_writes_its_results(name, tmp_path):
    run(name, FAST[name], tmp_path / "results.json")


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_a_longer_benchmark_writes_its_results(name, tmp_path):
    run(name, SLOW[name], tmp_path / "results.json")


def test_no_benchmark_is_forgotten():
    names = {path.stem.removeprefix("bench_") for path in (REPOSITORY / "benchmarks").glob("bench_*.py")}
    assert names == {*FAST, *SLOW, "prepare_data"}


def test_prepare_data_is_compared_and_an_absent_peer_is_omitted(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datatrove", None)
    flags = ["--tokens=1e5", "--texts=zipfian", "--rounds=1", "--num_workers=2", f"--output={tmp_path / 'x.json'}"]
    bench_prepare_data.main(flags)
    content, figures, omissions = read_results(tmp_path / "x.json")
    rates = {figure.subject: figure for figure in figures if figure.unit == "tokens/s"}
    assert rates.keys() == {"prepare_data.py", "gigatoken pool", "tiktoken pool"} == content["notes"].keys()
    assert rates["prepare_data.py"].ratios.keys() == {"gigatoken pool", "tiktoken pool"}
    ((subject, reason),) = ((each.subject, each.reason) for each in omissions)
    assert subject == "datatrove" and "pip install" in reason


def test_the_peers_write_the_same_tokens(tmp_path):
    write_zipfian(tmp_path / "source", 1e5, n_files=2)
    written = {}
    for name in ("gigatoken pool", "tiktoken pool"):
        (tmp_path / name).mkdir()
        tokenizer_peers.PEERS[name](tmp_path / "source", tmp_path / name, num_workers=2)
        (path,) = (tmp_path / name).iterdir()
        written[name] = path.read_bytes()
    assert written["gigatoken pool"] == written["tiktoken pool"]


def test_the_texts_have_new_words(tmp_path):
    write_zipfian(tmp_path / "zipfian", 1e5)
    n_documents, n_bytes, n_words, n_distinct = count_words(tmp_path / "zipfian")
    assert n_documents == 1000 and 400 < n_words / n_documents < 1200 and 4 < n_bytes / n_words < 8
    assert 0.02 < n_distinct / n_words < 0.2
    write_new_words(tmp_path / "new", 1e5)
    _, _, n_words, n_distinct = count_words(tmp_path / "new")
    assert n_distinct > 0.99 * n_words


def test_the_median_lies_between_the_order_statistics():
    assert find_median_interval([3.0, 1.0, 2.0]) == (1.0, 3.0)
    # The binomial distribution: 10 of 30 from either end cover the median with 95.7 %.
    assert find_median_interval([float(number) for number in range(1, 31)]) == (10.0, 21.0)
