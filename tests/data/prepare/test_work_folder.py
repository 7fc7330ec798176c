"""Writing shards in several runs: killed runs, tasks on several machines, and leftovers of all kinds."""

import contextlib
import errno
import json
import multiprocessing
import os
import random
import resource
import runpy
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from test_prepare_data import corpus, hash_folder, run, texts, tokenizer, write_texts  # noqa: F401

import prepare_data
from modeling_gpt2_repro.core import files, locks
from modeling_gpt2_repro.data.prepare import tokenize_stage, work_folder, write_stage
from modeling_gpt2_repro.data.sources import local_files

pytestmark = pytest.mark.heavy

FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def many_pieces(monkeypatch):
    """Split the corpus into about 15 tasks and 15 parts, where one of each would do."""
    monkeypatch.setattr(local_files, "TASK_BYTES", 2500)
    monkeypatch.setattr(tokenize_stage, "TOKENS_PER_SORTED_CHUNK", 500)
    monkeypatch.setattr(write_stage, "TOKENS_PER_BUCKET", 2000)


def list_flags(corpus: Path, tokenizer) -> list[str]:  # noqa: F811
    return [f"--files={corpus}", "--shard_size=7000", f"--tokenizer={tokenizer.name_or_path}", "--num_workers=2"]


@pytest.fixture
def flags(corpus, tokenizer):  # noqa: F811
    return list_flags(corpus, tokenizer)


@pytest.fixture(scope="module")
def undisturbed(texts, tokenizer, tmp_path_factory) -> Path:  # noqa: F811
    """A folder with a corpus, and with the shards of an undisturbed run in `whole`."""
    folder = tmp_path_factory.mktemp("undisturbed")
    flags = list_flags(write_texts(folder / "corpus.jsonl", texts), tokenizer)
    assert prepare_data.main([*flags, f"--output_dir={folder / 'whole'}"]) == 0
    return folder


@pytest.fixture
def expected(undisturbed, tmp_path):
    """The files of an undisturbed run on this test's copy of the corpus."""
    shutil.copytree(undisturbed / "whole", tmp_path / "whole")
    manifest = tmp_path / "whole" / "manifest.json"
    manifest.write_text(manifest.read_text().replace(str(undisturbed), str(tmp_path)))
    return hash_folder(tmp_path / "whole")


def list_pieces(folder) -> dict[str, int]:
    found = {}
    for path in (folder.with_name(folder.name + ".partial") / "unfinished").glob("*.json"):
        with contextlib.suppress(FileNotFoundError):  # removed at the end of a run
            found[path.name] = path.stat().st_ino
    return found


def start(flags) -> multiprocessing.Process:
    process = FORK.Process(target=lambda: sys.exit(prepare_data.main(flags)))
    process.start()
    return process


def kill_after(process, folder, n_pieces: int) -> dict[str, int]:
    """Kill the process once it has finished `n_pieces` pieces, or has ended; return the finished pieces."""
    while process.is_alive() and len(list_pieces(folder)) < n_pieces:
        time.sleep(0.0005)
    workers = []
    with contextlib.suppress(psutil.NoSuchProcess):
        workers = psutil.Process(process.pid).children()
    process.kill()
    process.join()
    psutil.wait_procs(workers, timeout=30)  # one may be about to finish a piece
    return list_pieces(folder)


@pytest.mark.slow
def test_a_run_killed_repeatedly_resumes_to_the_same_bytes(flags, expected, tmp_path, capfd):
    folder = tmp_path / "out"
    flags = [*flags, f"--output_dir={folder}"]
    pieces, kills = {}, 0
    delays = random.Random(0)
    while not folder.exists():
        process = start(flags)
        workers = []
        while process.is_alive() and not workers:
            workers = psutil.Process(process.pid).children()
        time.sleep(delays.uniform(0, 0.01))
        finished = kill_after(process, folder, len(pieces) + 3)
        assert psutil.wait_procs(workers, timeout=30)[1] == [], "a worker outlived its parent"
        if not folder.exists():
            kills += 1
            assert pieces.items() <= finished.items(), "a finished piece was rewritten"
            pieces = finished
            assert not (folder.with_name("out.partial") / "manifest.json").exists() or len(pieces) > 20
    assert kills >= 4
    assert hash_folder(folder) == expected
    assert not folder.with_name("out.partial").exists()
    assert "pieces finished" in capfd.readouterr().out


def test_changed_settings_are_reported_and_overwrite_starts_over(run, corpus, flags, expected, tmp_path):  # noqa: F811
    folder = tmp_path / "out"
    kill_after(start([*flags, f"--output_dir={folder}"]), folder, 3)
    pieces = list_pieces(folder)
    code, _, err = run(*flags, "--seed", 1, "--shard_size", 9000)
    assert code == 2
    assert "was started with different settings: shard_size (was 7000, now 9000), seed (was 1337, now 1)" in err
    assert list_pieces(folder) == pieces

    with open(corpus, "a") as stream:
        stream.write(json.dumps({"text": "one more"}) + "\n")
    code, _, err = run(*flags)
    assert code == 2
    assert "different settings: source" in err
    assert run(*flags, "--overwrite")[0] == 0
    assert hash_folder(folder) != expected


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "summary"])
def test_a_damaged_piece_is_rewritten(flags, expected, tmp_path, damage):
    folder = tmp_path / "out"
    flags = [*flags, f"--output_dir={folder}"]
    kill_after(start(flags), folder, 8)
    pieces = folder.with_name("out.partial") / "unfinished"
    damaged = (
        pieces
        / {
            "flip": "task-000000.tokens.bin",
            "truncate": "task-000001.documents.npy",
            "remove": "task-000000.tokens.bin",
            "summary": "task-000001.json",
        }[damage]
    )
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.unlink() if damage == "remove" else damaged.write_bytes(content[: None if damage == "flip" else 100])
    assert prepare_data.main(flags) == 0
    assert hash_folder(folder) == expected


def test_a_second_run_on_the_same_folder_is_rejected(flags, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(locks, "PATIENCE_SECONDS", 0.2)
    folder = tmp_path / "out"
    flags = [*flags, f"--output_dir={folder}"]
    first = start(flags)
    while not list_pieces(folder):
        time.sleep(0.001)
    os.kill(first.pid, signal.SIGSTOP)
    for more in ([], ["--stage=tokenize"], ["--overwrite"]):
        assert prepare_data.main([*flags, *more]) == 2
        assert (
            f"another prepare_data.py is working on {folder}.partial: process {first.pid} on" in capfd.readouterr().err
        )
    os.kill(first.pid, signal.SIGCONT)
    first.join()
    assert first.exitcode == 0


def test_a_file_system_without_locks_is_reported(flags, expected, tmp_path, monkeypatch, capfd):
    def flock(stream, mode):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", flock)
    flags = [*flags, f"--output_dir={tmp_path / 'out'}"]
    assert prepare_data.main([*flags, "--stage=tokenize"]) == 0
    assert prepare_data.main(flags) == 0
    assert "has no locks" in capfd.readouterr().out
    assert hash_folder(tmp_path / "out") == expected


def test_tasks_of_both_stages_in_any_order_write_the_same_folder(flags, expected, tmp_path, capfd):
    """Run each task in its own process: those of a stage at the same time, and one of them twice."""
    folder = tmp_path / "out"
    flags = [*flags, f"--output_dir={folder}"]
    for stage in ("tokenize", "write"):
        shares = [start([*flags, f"--stage={stage}", f"--task={i}/3"]) for i in (2, 0, 2)]
        for share in shares:
            share.join()
            assert share.exitcode == 0
        if stage == "tokenize":
            assert prepare_data.main([*flags, "--stage=write"]) == 2
            assert "task 1 " in (err := capfd.readouterr().err) and "--stage tokenize first" in err
        assert prepare_data.main([*flags, f"--stage={stage}", "--task=1/3"]) == 0
    before = list_pieces(folder)
    assert {name[:4] for name in before} == {"task", "part"}
    assert prepare_data.main(flags) == 0
    assert hash_folder(folder) == expected


def test_a_run_completes_what_a_task_started(flags, expected, tmp_path):
    folder = tmp_path / "out"
    flags = [*flags, f"--output_dir={folder}"]
    assert prepare_data.main([*flags, "--stage=tokenize", "--task=1/2"]) == 0
    assert prepare_data.main(flags) == 0
    assert hash_folder(folder) == expected


@pytest.mark.parametrize(
    "more, reason",
    [
        (["--task=0/2"], "--task needs a stage"),
        (["--stage=write", "--task=2/2"], "--task 2/2: must be i/N"),
        (["--stage=write", "--task=one"], "--task one: must be i/N"),
        (["--stage=tokenize", "--overwrite"], "--overwrite is not allowed with --stage"),
        (["--stage=tokenise"], "tokenize"),
    ],
)
def test_invalid_tasks_are_rejected(run, flags, more, reason):  # noqa: F811
    code, _, err = run(*flags, *more)
    assert code == 2
    assert reason in err


def test_split_sizes_that_do_not_fit_can_be_changed(run, flags, tmp_path):  # noqa: F811
    code, _, err = run(*flags, "--val_tokens", 10**9)
    assert code == 2
    assert "too few for a training split and a validation split" in err
    pieces = list_pieces(tmp_path / "out")
    assert pieces
    code, out, _ = run(*flags, "--val_tokens", 500)
    assert code == 0
    assert f"{len(pieces)} pieces finished" in out


def run_script(flags, err: Path, setup: Callable[[], object] = lambda: None) -> multiprocessing.Process:
    """Start the script, after `setup`, in a process that leads its own session and writes its stderr to `err`."""

    def main():
        os.setsid()
        os.dup2(os.open(err, os.O_WRONLY | os.O_CREAT), 2)
        sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115
        setup()
        sys.argv = [prepare_data.__file__, *flags]
        runpy.run_path(prepare_data.__file__, run_name="__main__")

    process = FORK.Process(target=main)
    process.start()
    return process


def run_limited(flags, err: Path, resource_kind: int, limit: int) -> int:
    """Run the script in a process with a resource limit; return its exit code."""

    def set_limit() -> None:
        os.closerange(3, 4096)  # a fork inherits what earlier tests left open, and these would count
        resource.setrlimit(resource_kind, (limit, limit))

    process = run_script(flags, err, set_limit)
    process.join()
    return process.exitcode


@pytest.mark.parametrize("limit", [3_000, 12_000])
def test_a_full_disk_keeps_finished_pieces(flags, expected, tmp_path, limit):
    """Run a process that may write files of 3,000 or 12,000 bytes, which a task or a shard exceeds."""
    folder, err = tmp_path / "out", tmp_path / "err"
    flags = [*flags, f"--output_dir={folder}"]
    assert run_limited(flags, err, resource.RLIMIT_FSIZE, limit) == 2, err.read_text()
    printed = err.read_text()
    assert "cannot write" in printed and "File too large" in printed
    assert "Traceback" not in printed
    assert not folder.exists()
    pieces = list_pieces(folder)
    assert prepare_data.main(flags) == 0
    assert hash_folder(folder) == expected
    assert bool(pieces) == ("finished pieces are kept" in printed) == (limit > 10_000)


def test_more_sorted_chunks_than_open_files_are_merged(flags, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(local_files, "TASK_BYTES", 300)
    monkeypatch.setattr(write_stage, "TOKENS_PER_BUCKET", 10**6)
    flags, err = [*flags, f"--output_dir={tmp_path / 'out'}"], tmp_path / "err"
    assert run_limited(flags, err, resource.RLIMIT_NOFILE, 64) == 0, err.read_text()
    assert hash_folder(tmp_path / "out") == expected


@pytest.mark.parametrize("moment", ["sync", "rmtree", "replace"])
def test_a_run_killed_while_publishing_finishes_on_the_next_run(run, flags, expected, tmp_path, moment):  # noqa: F811
    folder = tmp_path / "out"
    flags = [*flags, f"--output_dir={folder}"]
    calls = {"sync": (work_folder, "sync_tree"), "rmtree": (shutil, "rmtree"), "replace": (work_folder, "rename_over")}

    def run_until_killed():
        owner, name = calls[moment]
        original = getattr(owner, name)

        def kill_self(path, *arguments, **options):
            if Path(path) == work.pieces or Path(path) == work.path:
                os._exit(9)
            return original(path, *arguments, **options)

        work = work_folder.WorkFolder(folder)
        setattr(owner, name, kill_self)
        sys.exit(prepare_data.main(flags))

    process = FORK.Process(target=run_until_killed)
    process.start()
    process.join()
    assert process.exitcode == 9
    code, _, err = run(*flags, "--seed", 7)
    assert code == 2
    assert "was started with different settings: seed" in err
    made = {path.name: path.stat().st_ino for path in folder.with_name("out.partial").glob("*.npy")}
    assert prepare_data.main(flags) == 0
    assert hash_folder(folder) == expected
    assert {path.name: path.stat().st_ino for path in folder.glob("*.npy")} == made


def test_changed_input_files_are_noticed(run, corpus, flags, tmp_path):  # noqa: F811
    folder = tmp_path / "out"
    kill_after(start([*flags, f"--output_dir={folder}"]), folder, 3)
    content = corpus.read_bytes()
    corpus.write_bytes(content.swapcase())
    code, _, err = run(*flags)
    assert code == 2
    assert "the files of the corpus changed since" in err


def test_unrelated_folders_beside_the_output_are_kept(run, flags, tmp_path):  # noqa: F811
    assert run(*flags)[0] == 0
    others = [tmp_path / "out.partial", tmp_path / "out.replaced"]
    for other in others:
        other.mkdir()
        (other / "thesis.tex").write_text("years of work")
    assert run(*flags)[0] == 0
    code, _, err = run(*flags, "--overwrite")
    assert code == 2 and "thesis.tex" in err
    assert [path.name for other in others for path in other.iterdir()] == ["thesis.tex"] * 2


def test_a_finished_folder_named_like_a_work_folder_is_kept(run, flags, tmp_path):  # noqa: F811
    for name in ("out", "other"):
        assert run(*flags, output_dir=tmp_path / name)[0] == 0
    other = (tmp_path / "other").rename(tmp_path / "out.partial")
    expected = hash_folder(other)
    assert run(*flags)[0] == 0
    assert run(*flags, "--overwrite")[0] == 2
    assert hash_folder(other) == expected


@pytest.mark.parametrize("has_shards", [False, True])
def test_overwrite_removes_a_folder_without_a_manifest(run, flags, expected, tmp_path, has_shards):  # noqa: F811
    if has_shards:
        assert run(*flags, "--seed=7")[0] == 0
        (tmp_path / "out" / "manifest.json").unlink()
    else:
        (tmp_path / "out").mkdir()
    assert run(*flags, "--overwrite")[0] == 0
    assert hash_folder(tmp_path / "out") == expected
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith("out.")]


def test_a_run_keeps_its_lock_until_it_has_published(flags, expected, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(locks, "PATIENCE_SECONDS", 0.2)
    folder, reached, resume = tmp_path / "out", FORK.Event(), FORK.Event()
    flags = [*flags, f"--output_dir={folder}"]
    assert prepare_data.main([*flags, "--seed=7"]) == 0
    sync_tree = work_folder.sync_tree

    def wait_and_sync(path):
        reached.set()
        assert resume.wait(60)
        sync_tree(path)

    with monkeypatch.context() as patched:
        patched.setattr(work_folder, "sync_tree", wait_and_sync)
        process = start([*flags, "--overwrite"])
    assert reached.wait(60)
    assert prepare_data.main([*flags, "--overwrite"]) == 2
    assert "another prepare_data.py is working on" in capfd.readouterr().err
    resume.set()
    process.join()
    assert process.exitcode == 0 and hash_folder(folder) == expected
    assert not folder.with_name("out.partial").exists()


def test_partial_files_of_killed_workers_are_removed(run, flags, tmp_path):  # noqa: F811
    flags = [*flags, "--val_tokens=1000000000"]  # more than the corpus has, so finished pieces are kept
    assert run(*flags)[0] == 2
    pieces = list_pieces(tmp_path / "out")
    left = tmp_path / "out.partial" / "unfinished" / f"task-000001.tokens.bin.{'0a' * 16}"
    left.touch()
    assert run(*flags)[0] == 2
    assert not left.exists()
    assert list_pieces(tmp_path / "out") == pieces


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGUSR1, 138)]
)
def test_a_run_stopped_by_a_signal_reports_the_kept_pieces(flags, tmp_path, monkeypatch, number, code):
    """Signal the whole process group, as Ctrl-C in a terminal and batch systems do."""
    monkeypatch.setattr(local_files, "TASK_BYTES", 100)
    folder, err = tmp_path / "out", tmp_path / "err"
    process = run_script([*flags, f"--output_dir={folder}"], err)
    while not list_pieces(folder) and process.is_alive():
        time.sleep(0.001)
    os.killpg(process.pid, number)
    process.join()
    printed = err.read_text()
    assert process.exitcode == code, printed
    assert "finished pieces are kept" in printed
    assert "Traceback" not in printed
