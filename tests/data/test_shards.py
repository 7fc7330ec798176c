"""The shard format: which files are read, and which are rejected with a message that has the file's name."""

import dataclasses
import json
import pickle

import numpy as np
import pytest
from written_shards import DAMAGES, LFS_POINTER, assert_shard_rejected, write_bytes, write_llmc, write_shards

from modeling_gpt2_repro.core.errors import UserError
from modeling_gpt2_repro.core.files import compute_checksum
from modeling_gpt2_repro.data.shards import (
    BASELINES_NAME,
    MANIFEST_NAME,
    WORK_FOLDER,
    Totals,
    find_foreign_file,
    fingerprint_split,
    list_checksums,
    load_manifest,
    map_files,
    open_split,
    save_manifest,
)


@pytest.fixture
def folder(tmp_path):
    return write_shards(tmp_path)


def test_shards_are_plain_npy(folder):
    parts = [np.load(folder / f"x_train_00000{i}.npy") for i in (1, 2, 3)]
    assert [len(part) for part in parts] == [10, 10, 5]
    assert all(part.dtype == np.uint16 for part in parts)
    opened = open_split(folder, "train")
    assert np.array_equal(np.concatenate(opened), np.concatenate(parts))
    assert np.concatenate(opened)[[1, 6, 24]].tolist() == [1, 6, 24]


def test_shards_are_identified_by_their_files(folder):
    assert [path.name for path in map_files(folder, "train")] == [f"x_train_00000{i}.npy" for i in (1, 2, 3)]
    for path, tokens in map_files(folder, "train").items():
        assert np.array_equal(tokens, np.load(path))


def test_the_manifest_survives_a_round_trip(folder):
    manifest = load_manifest(folder)
    save_manifest(manifest, folder)
    assert load_manifest(folder) == manifest


def test_manifest_proves_that_no_token_was_lost(folder):
    manifest = load_manifest(folder)
    with pytest.raises(ValueError, match="tokens of the splits do not add up"):
        dataclasses.replace(manifest, read=Totals(7, 36, 28))


@pytest.mark.parametrize("name", ["fineweb_{split}_{i:06d}.npy", "{split}_{i:06d}.npy"])
def test_reads_a_folder_without_manifest(tmp_path, name):
    for i in (1, 0):
        np.save(tmp_path / name.format(split="train", i=i), np.full(3, i, np.uint16))
    np.save(tmp_path / name.format(split="val", i=0), np.full(3, 7, np.uint16))
    assert np.concatenate(open_split(tmp_path, "train")).tolist() == [0, 0, 0, 1, 1, 1]
    assert load_manifest(tmp_path) is None


def test_checksums_come_from_the_manifest_or_from_the_files(folder):
    from_manifest = {split: list_checksums(folder, split) for split in ("val", "train")}
    assert [len(checksums) for checksums in from_manifest.values()] == [1, 3]
    (folder / MANIFEST_NAME).unlink()
    assert {split: list_checksums(folder, split) for split in ("val", "train")} == from_manifest

    write_llmc(folder / "x_val_000000.bin", [5, 6, 7])
    (folder / "x_val_000000.npy").unlink()
    assert list_checksums(folder, "val") == [compute_checksum(folder / "x_val_000000.bin")]
    (folder / "x_val_000000.bin").unlink()
    assert list_checksums(folder, "val") == []


def test_kept_baselines_belong_to_a_folder_of_shards(folder):
    (folder / BASELINES_NAME).write_text("[]")
    for name in (".DS_Store", "manifest.json.partial"):  # left by a file manager and by a killed process
        (folder / name).touch()
    assert find_foreign_file(folder) is None
    (folder / "other.json").write_text("[]")
    assert find_foreign_file(folder) == "other.json"


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_shard_is_reported(folder, damage):
    damage(folder)
    with pytest.raises(UserError, match=r"x_train_000002\.npy"):
        open_split(folder, "train")
    assert len(open_split(folder, "val")) == 1


def save_npz(path):
    with path.open("wb") as stream:
        np.savez(stream, np.ones(9, np.uint16))


OTHER_CONTENTS = [
    ("x_train_000001.npy", write_bytes(LFS_POINTER), "git lfs pull"),
    ("x_train_000001.npy", write_bytes(b""), "empty"),
    *(
        ("x_train_000001.npy", lambda path, array=array: np.save(path, array), complaint)
        for array, complaint in [
            (np.ones(9, np.int64), "<i8"),
            (np.ones(9, ">u2"), ">u2"),
            (np.ones((3, 3), np.uint16), r"\(3, 3\)"),
            (np.ones((3, 3), np.uint16, order="F"), r"\(3, 3\)"),
            (np.ones(9, bool), r"\|b1"),
            (np.ones(9, np.float32), "<f4"),
            (np.array([{}]), "Python objects"),
        ]
    ),
    ("x_train_000001.npy", save_npz, "npz"),
    ("x_train_000001.npy", write_bytes(pickle.dumps([1, 2])), "not a complete .npy"),
]


@pytest.mark.parametrize(("name", "write", "complaint"), OTHER_CONTENTS)
def test_a_file_with_a_shards_name_is_reported_by_its_format(tmp_path, name, write, complaint):
    write(tmp_path / name)
    assert_shard_rejected(tmp_path / name, complaint)


def test_a_file_in_place_of_a_folder(tmp_path):
    write_llmc(tmp_path / "x_train.bin", [1, 2])
    with pytest.raises(UserError, match="is a file: give a folder"):
        open_split(tmp_path / "x_train.bin", "train")


def test_missing_folder_and_split(tmp_path, folder):
    with pytest.raises(UserError, match=r"prepare_data\.py"):
        open_split(tmp_path / "none", "train")
    for path in folder.glob("*"):
        path.unlink()
    with pytest.raises(UserError, match="no val shards"):
        open_split(folder, "val")


def test_unfinished_folder_is_rejected(folder):
    (folder / WORK_FOLDER).mkdir()
    with pytest.raises(UserError, match="unfinished"):
        open_split(folder, "train")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda manifest: manifest["shards"][0].update(file="../x_val_000000.npy"), "not a file of its folder"),
        (lambda manifest: manifest.update(format_version=2), "format version 2"),
        (lambda manifest: manifest.pop("eot_id"), "damaged"),
        (lambda manifest: manifest["train"].update(tokens=24), "damaged"),
    ],
)
def test_an_inconsistent_manifest_is_rejected(folder, change, reason):
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    change(manifest)
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=reason):
        open_split(folder, "train")


def test_a_manifest_that_is_not_json_is_rejected(folder):
    (folder / MANIFEST_NAME).write_text("{")
    with pytest.raises(UserError, match="damaged"):
        load_manifest(folder)


def test_a_split_without_a_manifest_is_known_by_the_names_and_sizes_of_its_shards(tmp_path):
    np.save(tmp_path / "story_train_000001.npy", np.arange(50, dtype=np.uint16))
    np.save(tmp_path / "story_val_000000.npy", np.arange(50, dtype=np.uint16))
    before = fingerprint_split(tmp_path, "train")
    np.save(tmp_path / "story_val_000000.npy", np.arange(40, dtype=np.uint16))
    assert fingerprint_split(tmp_path, "train") == before
    np.save(tmp_path / "story_train_000001.npy", np.arange(49, dtype=np.uint16))
    shorter = fingerprint_split(tmp_path, "train")
    np.save(tmp_path / "story_train_000001.npy", np.arange(50, dtype=np.uint16))
    assert shorter != before == fingerprint_split(tmp_path, "train")
    np.save(tmp_path / "story_train_000002.npy", np.arange(1, dtype=np.uint16))
    assert fingerprint_split(tmp_path, "train") != before
