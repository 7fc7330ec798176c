"""A small folder of shards, ways to damage one of them, and shards in other programs' formats."""

from pathlib import Path

import numpy as np
import pytest

from modeling_gpt2_repro.core.errors import UserError
from modeling_gpt2_repro.core.files import compute_checksum
from modeling_gpt2_repro.data.shards import Manifest, Shard, SplitWriter, Totals, open_split, save_manifest

EOT = 99
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 20\n"


def write_shards(folder: Path) -> Path:
    """Write 10 validation tokens and 25 training tokens in shards of ten, with their manifest."""
    tokens = {"val": np.arange(10, dtype=np.uint16), "train": np.arange(25, dtype=np.uint16)}
    shards = []
    for split, first_number in (("val", 0), ("train", 1)):
        tokens[split][::5] = EOT
        writer = SplitWriter(folder, "x", split, first_number, len(tokens[split]), 10)
        writer.create_files()
        writer.write(7, tokens[split][7:])
        writer.write(0, tokens[split][:7])
        for name, size in zip(writer.names, writer.sizes, strict=True):
            shards.append(Shard(name, split, -(-size // 5), size, compute_checksum(folder / name)))
    manifest = Manifest(
        source={"id": "test"},
        tokenizer="x",
        tokenizer_fingerprint="sha256:0",
        vocab_size=100,
        eot_id=EOT,
        seed=1,
        shuffled=False,
        settings={},
        read=Totals(7, 35, 28),
        train=Totals(5, 25, 20),
        val=Totals(2, 10, 8),
        validation_copies=Totals(),
        duplicates=0,
        empty_documents=0,
        validation_ends_inside_document=False,
        shards=shards,
    )
    save_manifest(manifest, folder)
    return folder


def write_llmc(path, tokens, magic=20240520, count=None, version=1):
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    path.write_bytes(header.tobytes() + np.array(tokens, "<u2").tobytes())


def write_bytes(content):
    return lambda path: path.write_bytes(content)


def assert_shard_rejected(path, complaint):
    """Check that a folder's only shard is rejected with `complaint`, in a message that has its path."""
    with pytest.raises(UserError, match=complaint) as raised:
        open_split(path.parent, "train")
    assert str(path) in str(raised.value)


def damage_missing(folder):
    (folder / "x_train_000002.npy").unlink()


def damage_truncated(folder):
    path = folder / "x_train_000002.npy"
    path.write_bytes(path.read_bytes()[:-4])


def damage_empty(folder):
    (folder / "x_train_000002.npy").write_bytes(b"")


def damage_dtype(folder):
    np.save(folder / "x_train_000002.npy", np.zeros(10, np.int32))


def damage_size(folder):
    np.save(folder / "x_train_000002.npy", np.zeros(11, np.uint16))


DAMAGES = [damage_missing, damage_truncated, damage_empty, damage_dtype, damage_size]
