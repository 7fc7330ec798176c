"""Token files of other programs: which are read, and which are rejected with a message that has the file's name."""

import gzip
import pickle

import numpy as np
import pytest
from written_shards import LFS_POINTER, assert_shard_rejected, write_bytes, write_llmc

from modeling_gpt2_repro.core.errors import UserError
from modeling_gpt2_repro.data.shards import list_checksums, map_files, open_split


def test_reads_llmc_shards(tmp_path):
    write_llmc(tmp_path / "tiny_shakespeare_val.bin", [5, 6, 7])
    write_llmc(tmp_path / "edu_fineweb_train_000001.bin", [1, 2])
    assert open_split(tmp_path, "val")[0].tolist() == [5, 6, 7]
    assert open_split(tmp_path, "train")[0].tolist() == [1, 2]


def test_bad_llmc_shards_are_rejected(tmp_path):
    write_llmc(tmp_path / "a_train_000000.bin", [1, 2], count=3)
    with pytest.raises(UserError, match="truncated"):
        open_split(tmp_path, "train")
    write_llmc(tmp_path / "a_train_000000.bin", [1, 2], magic=1)
    with pytest.raises(UserError, match=r"not an llm\.c shard"):
        open_split(tmp_path, "train")


def test_reads_nanogpt_files(tmp_path):
    """These have no header; first tokens that look like two bytes of another format's magic number prove nothing."""
    for tokens in ([5, 50256, 7], [0x8B1F, 1, 2], [0x4B50, 1, 0], [1, 2, 3, 4, 0x227B, 9], [7]):
        np.array(tokens, "<u2").tofile(tmp_path / "train.bin")
        np.array(tokens[::-1], "<u2").tofile(tmp_path / "val.bin")
        assert open_split(tmp_path, "train")[0].tolist() == tokens
        assert open_split(tmp_path, "val")[0].tolist() == tokens[::-1]
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 65}))
    with pytest.raises(UserError, match=r"meta\.pkl.*prepare_data\.py --files"):
        open_split(tmp_path, "train")
    # llm.c's files have a header of their own.
    write_llmc(tmp_path / "train.bin", [1, 2])
    assert open_split(tmp_path, "train")[0].tolist() == [1, 2]


def test_evaluation_files_of_llmc_are_not_shards(tmp_path):
    write_llmc(tmp_path / "fineweb_val_000000.bin", [5, 6, 7])
    for name in ("hellaswag_val.bin", "mmlu_val.bin"):
        write_llmc(tmp_path / name, [65535, 20], magic=20240522)
    assert [path.name for path in map_files(tmp_path, "val")] == ["fineweb_val_000000.bin"]
    assert len(list_checksums(tmp_path, "val")) == 1


OTHER_CONTENTS = [
    ("train.bin", write_bytes(LFS_POINTER), "git lfs pull"),
    ("train.bin", write_bytes(b"<!DOCTYPE html><html>404</html>"), "web page"),
    ("x_train_000001.bin", write_bytes(b"\n<html>"), "web page"),
    ("train.bin", write_bytes(b"First Citizen: Before we proceed any further, hear me speak."), "it is text"),
    ("train.bin", write_bytes(gzip.compress(b"tokens")), "decompress"),
    ("train.bin", write_bytes(b""), "empty"),
    ("train.bin", write_bytes(b"\1\0\2"), "odd number of bytes"),
    ("train.bin", np.arange(9, dtype="<u4").tofile, "four bytes"),
    ("train.bin", np.arange(9, dtype="<i8").tofile, "four bytes"),
    ("x_train_000001.bin", np.arange(9, dtype="<u2").tofile, "no header"),
    ("x_train.bin", lambda path: write_llmc(path, [1, 2], magic=20240801, version=7), "Llama 3"),
    ("x_train.bin", lambda path: write_llmc(path, [1, 2], magic=20240326), "llm.c GPT-2 model"),
    ("x_train.bin", lambda path: write_llmc(path, [1, 2], version=2), "version 1"),
    ("x_train.bin", lambda path: write_llmc(path, [1, 2], count=1), "too long"),
    ("x_train.bin", write_bytes((20240520).to_bytes(4, "little")), "version 1"),
]


@pytest.mark.parametrize(("name", "write", "complaint"), OTHER_CONTENTS)
def test_a_file_of_another_program_is_identified_and_rejected(tmp_path, name, write, complaint):
    write(tmp_path / name)
    assert_shard_rejected(tmp_path / name, complaint)


@pytest.mark.parametrize(
    ("names", "complaint"),
    [
        (["dataset_info.json", "state.json", "data-00000-of-00001.arrow"], "save_to_disk.*to_parquet"),
        (["dataset_dict.json", "train/dataset_info.json"], "save_to_disk"),
        (["train-00000-of-00001.parquet", "README.md"], r"prepare_data\.py --files '.*/\*\.parquet'"),
        (["a.jsonl"], r"--files '.*/\*\.jsonl'"),
        (["a.jsonl.gz"], r"--files '.*/\*\.jsonl\.gz'"),
        (["input.txt", "prepare.py"], r"--files '.*/\*\.txt'"),
        (["x_text_document.bin", "x_text_document.idx"], "Megatron"),
        (["train/x_000001.npy", "val/x_000000.npy"], "/train has some"),
        (["tokens_0.npy"], r"such as tokens_0\.npy"),
        (["x_test_000000.bin"], "other files"),
        ([], r"prepare_data\.py"),
    ],
)
def test_a_folder_of_other_data_is_rejected_with_advice(tmp_path, names, complaint):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UserError, match=f"has no train shards .*{complaint}"):
        open_split(tmp_path, "train")
