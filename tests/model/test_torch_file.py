"""Checkpoint files: which are read, which are rejected, and that none of them runs code."""

import gzip
import os
import pickle
import re
import sys
import tarfile

import numpy as np
import pytest
import torch
from nanogpt_files import Reference, assert_same_function, save_nanogpt

from modeling_gpt2_repro.__main__ import main
from modeling_gpt2_repro.core.errors import UserError
from modeling_gpt2_repro.model.convert_nanogpt import load_nanogpt


def test_arrays_and_scalars_of_numpy_1_are_read(tmp_path):
    """NumPy 1 pickled arrays with `numpy.core`, which NumPy 2 renamed."""
    reference, path = Reference(), tmp_path / "ckpt.pt"
    torch.save(
        {"model": reference.state_dict(), "best_val_loss": np.float32(3.5)}, path, _use_new_zipfile_serialization=False
    )
    content = path.read_bytes()
    assert b"cnumpy._core.multiarray" in content
    path.write_bytes(content.replace(b"cnumpy._core.multiarray", b"cnumpy.core.multiarray"))
    assert_same_function(load_nanogpt(path, None, n_head=2), reference)


def write_old_tar(path):
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("storages"))


@pytest.mark.parametrize(
    ("write", "complaint"),
    [
        (
            lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
            "git lfs pull",
        ),
        (lambda path: path.write_text("<!doctype html>\n<title>404</title>"), "web page"),
        (lambda path: path.write_bytes(gzip.compress(b"weights")), "decompress"),
        (lambda path: path.write_text("{'loss': 3.5, 'step': 3}"), "it is text"),
        (lambda path: path.touch(), "it is empty"),
        (lambda path: path.mkdir(), "is a folder"),
        (lambda path: path.write_bytes(b"\x89HDF\r\n"), "HDF5"),
        (lambda path: path.write_bytes(b"GGUF\3\0\0\0"), "GGUF"),
        (write_old_tar, "tar archive"),
        (lambda path: path.write_bytes(pickle.dumps({"model": {}})), "not a complete torch.save file"),
        (lambda path: torch.save(Reference(), path), r"would run code \(\S*Reference\)"),
        (lambda path: torch.save({"model": torch.nn.Linear(2, 2)}, path), r"would run code \(torch.nn\S+Linear\)"),
        (lambda path: torch.save({"model": {}}, path, pickle_protocol=4), "not a complete torch.save file"),
        (lambda path: np.savez(path.open("wb"), weights=np.ones(2)), "not a complete torch.save file"),
    ],
)
def test_other_files_with_the_name_of_a_checkpoint_are_identified(tmp_path, write, complaint, capfd):
    write(tmp_path / "ckpt.pt")
    assert (
        main(
            ["convert", f"--checkpoint={tmp_path / 'ckpt.pt'}", f"--output_dir={tmp_path / 'out'}", "--tokenizer=none"]
        )
        == 2
    )
    (line,) = capfd.readouterr().err.splitlines()
    assert "ckpt.pt" in line and re.search(complaint, line), line


class Bomb:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("place", ["config", "model_args"])
def test_code_in_a_file_is_not_run(tmp_path, place):
    path, target = tmp_path / "ckpt.pt", tmp_path / "ran"
    torch.save({"model": Reference().state_dict(), place: Bomb(target)}, path)
    with pytest.raises(UserError, match=r"would run code.*mkdir"):
        load_nanogpt(path, None)
    assert not target.exists()
    torch.load(path, weights_only=False)
    assert target.exists()  # unsafe loading does run it


def test_a_class_that_calls_itself_gptconfig_is_not_imported(tmp_path, monkeypatch):
    """Only the class name is known: no module of that name is imported, and calling the class does nothing."""
    (tmp_path / "evil.py").write_text("import os\nclass GPTConfig:\n    def __init__(self, *a): os.mkdir('ran')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    import evil

    class Call:
        def __reduce__(self):
            return evil.GPTConfig, ("argument",)

    torch.save({"model": Reference().state_dict(), "config": Call()}, "ckpt.pt")
    monkeypatch.delitem(sys.modules, "evil")
    with pytest.raises(UserError, match="not a complete"):
        load_nanogpt("ckpt.pt", None)
    assert "evil" not in sys.modules
    assert not (tmp_path / "ran").exists()


def test_files_that_are_not_checkpoints_are_rejected(tmp_path):
    whole = save_nanogpt(tmp_path / "whole.pt", Reference()).read_bytes()
    (tmp_path / "truncated.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.pt").write_text("not a checkpoint")
    (tmp_path / "empty.pt").touch()
    torch.save([torch.ones(2)], tmp_path / "list.pt")
    torch.save({"step": 3}, tmp_path / "dict.pt")
    torch.save({}, tmp_path / "nothing.pt")
    for name in ("truncated", "text", "empty", "list", "dict", "nothing", "absent"):
        with pytest.raises(UserError, match=f"{name}.pt"):
            load_nanogpt(tmp_path / f"{name}.pt", None)
