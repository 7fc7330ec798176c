"""Verifying a folder of shards: every difference is reported with its file and position."""

import json

import numpy as np
import pytest
from written_shards import DAMAGES, EOT, write_shards

from modeling_gpt2_repro.core.errors import UserError
from modeling_gpt2_repro.core.files import compute_checksum
from modeling_gpt2_repro.data.shards import BASELINES_NAME, MANIFEST_NAME, load_manifest, open_split
from modeling_gpt2_repro.data.verification import verify_folder


@pytest.fixture
def folder(tmp_path):
    return write_shards(tmp_path)


def test_an_intact_folder_passes(folder):
    assert verify_folder(folder) == load_manifest(folder)
    (folder / BASELINES_NAME).write_text("[]")
    verify_folder(folder)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_shard_is_reported(folder, damage):
    damage(folder)
    with pytest.raises(UserError, match=r"x_train_000002\.npy"):
        verify_folder(folder)


def rewrite(folder, tokens, checksum=True):
    path = folder / "x_train_000002.npy"
    np.save(path, np.asarray(tokens, np.uint16))
    if checksum:
        manifest = json.loads((folder / MANIFEST_NAME).read_text())
        manifest["shards"][2]["checksum"] = compute_checksum(path)
        (folder / MANIFEST_NAME).write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("tokens", "checksum", "reason"),
    [
        ([EOT, 1, 2, 3, 4, EOT, 1, 2, 3, 5], False, "checksum"),
        (
            [EOT, 1, 2, 3, 4, EOT, 1, 2, 102, 100],
            True,
            "2 ids beyond the vocabulary of 100, the first, 102, at position 8",
        ),
        ([EOT, 1, 2, 3, 4, 1, 1, 2, 3, 4], True, "1 documents instead of 2"),
        ([EOT, EOT, 2, 3, 4, 1, 1, 2, 3, 4], True, "1 empty documents, the first of which ends at position 1"),
    ],
)
def test_verify_finds_damage_that_opening_does_not(folder, tokens, checksum, reason):
    rewrite(folder, tokens, checksum)
    open_split(folder, "train")
    with pytest.raises(UserError, match=rf"x_train_000002\.npy.*{reason}"):
        verify_folder(folder)


def test_verify_distinguishes_renamed_foreign_and_missing_shards(folder):
    (folder / "x_train_000001.npy").rename(folder / "x_train_000009.npy")
    np.save(folder / "y_train_000001.npy", np.zeros(3, np.uint16))
    (folder / "x_train_000003.npy").unlink()
    with pytest.raises(UserError) as caught:
        verify_folder(folder)
    for problem in (
        "x_train_000001.npy is now x_train_000009.npy",
        "y_train_000001.npy is not in the manifest",
        "x_train_000003.npy is missing",
    ):
        assert problem in str(caught.value)


def test_verify_finds_a_split_that_begins_inside_a_document(folder):
    tokens = np.load(folder / "x_val_000000.npy")
    tokens[[0, 1]] = tokens[[1, 0]]
    np.save(folder / "x_val_000000.npy", tokens)
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    manifest["shards"][0]["checksum"] = compute_checksum(folder / "x_val_000000.npy")
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"x_val_000000\.npy begins inside a document"):
        verify_folder(folder)
