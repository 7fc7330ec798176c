"""Atomic writes of files and folders, and checksums."""

import hashlib
import multiprocessing
import os
import threading

import pytest

from modeling_gpt2_repro.core.files import compute_checksum, create_folder_atomically, open_atomically
from modeling_gpt2_repro.model.folder import identify_weights


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), open_atomically(path) as stream:
        stream.write("half of the n")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    with open_atomically(path) as stream:
        stream.write("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_named_pipe_is_written_to_and_kept(tmp_path):
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()), daemon=True)
    reader.start()
    with open_atomically(pipe) as stream:
        stream.write("scores")
    reader.join(timeout=30)
    assert read == ["scores"] and pipe.is_fifo() and list(tmp_path.iterdir()) == [pipe]


def test_writing_to_a_link_replaces_its_target_file(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "file.txt")
    with open_atomically(tmp_path / "link") as stream:
        stream.write("new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file.txt").read_text() == "new"


def test_a_link_with_the_name_of_a_temporary_file_is_not_followed(tmp_path):
    for name in ("file.txt", "folder"):
        (tmp_path / f"{name}.partial").symlink_to(tmp_path / "theirs")
    (tmp_path / "theirs").write_text("theirs")
    with open_atomically(tmp_path / "file.txt") as stream:
        stream.write("new")
    with create_folder_atomically(tmp_path / "folder"):
        pass
    assert {path.name for path in tmp_path.iterdir() if not path.is_symlink()} == {"theirs", "file.txt", "folder"}
    assert (tmp_path / "theirs").read_text() == "theirs" and len(list(tmp_path.iterdir())) == 3


def test_a_link_to_itself_is_not_replaced(tmp_path):
    (tmp_path / "link").symlink_to("link")
    for create in (open_atomically, create_folder_atomically):
        with pytest.raises(OSError, match="symbolic links"), create(tmp_path / "link"):
            pass
    assert (tmp_path / "link").is_symlink()


def test_a_failed_folder_leaves_the_old_one(tmp_path):
    folder = tmp_path / "folder"
    for content in ("old", "new"):
        with create_folder_atomically(folder) as temporary:
            (temporary / "file.txt").write_text(content)
    with pytest.raises(RuntimeError), create_folder_atomically(folder) as temporary:
        (temporary / "file.txt").write_text("half")
        raise RuntimeError
    assert (folder / "file.txt").read_text() == "new"
    assert list(tmp_path.iterdir()) == [folder]


def test_writing_to_a_link_replaces_its_target_folder(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with create_folder_atomically(tmp_path / "link") as temporary:
        (temporary / "file.txt").write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "elsewhere" / "file.txt").read_text() == "new"


def test_a_checksum_is_the_sha256_of_the_bytes(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    assert compute_checksum(tmp_path / "file") == "sha256:" + hashlib.sha256(b"abc").hexdigest()


def test_sharded_weights_are_identified_by_all_their_files(tmp_path):
    assert identify_weights(tmp_path) is None and identify_weights("me/model") is None
    (tmp_path / "a.safetensors").write_bytes(b"a")
    assert identify_weights(tmp_path) == compute_checksum(tmp_path / "a.safetensors")
    found = set()
    for content in (b"b", b"c"):
        (tmp_path / "b.safetensors").write_bytes(content)
        found.add(identify_weights(tmp_path))
    assert len(found) == 2


def test_processes_that_write_the_same_file_take_turns(tmp_path):
    """Check also that the file is complete after each write, whichever process was last."""
    path, count = tmp_path / "results.json", 4

    def write(number: int) -> None:
        for _ in range(20):
            with open_atomically(path) as stream:
                for _ in range(50):
                    stream.write(str(number) * 100)
                    stream.flush()

    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=write, args=[number]) for number in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * count
    assert path.read_text() in [str(number) * 5000 for number in range(count)]
    assert list(tmp_path.iterdir()) == [path]


def test_a_killed_process_leaves_nothing_in_the_next_file(tmp_path):
    (tmp_path / "a.partial").write_text("a long text that was begun")
    with open_atomically(tmp_path / "a") as stream:
        stream.write("short")
    assert (tmp_path / "a").read_text() == "short" and list(tmp_path.iterdir()) == [tmp_path / "a"]
