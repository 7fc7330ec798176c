"""Any folder of shards: its manifest, its shards, and the baselines that `--eval_only` stores in it."""

import io
import json
import os
import pickle
import shutil

import numpy as np
import pytest
from cases import EOT, TINY, Case, answer, build_originals, cases, open_case, to_flags
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import NO_FILES, ODD_JSON_FILES, damage_bytes, damage_json, replace_file

import prepare_data
import train

SHARD = "a_train_000001.npy"
# The shortest run of each kind of reader of a data folder.
COMMANDS = {
    "plan": (train.main, to_flags(TINY | {"plan": True})),
    "train": (train.main, to_flags(TINY | {"sample_every": 0, "save_every": 0, "max_steps": 1})),
    "measure": (train.main, to_flags(TINY | {"eval_only": True, "init_from": "../given/model"})),
    "verify": (prepare_data.main, ["--output_dir=../given/data", "--verify"]),
    "inspect": (prepare_data.main, ["--output_dir=../given/data", "--inspect=2"]),
    "prepare again": (
        prepare_data.main,
        ["--files=../given/corpus/a.jsonl", "--output_dir=../given/data", "--tokenizer=../given/tokenizer"],
    ),
}
commands = st.sampled_from(["plan", "train", "measure", "verify", "verify", "inspect", "prepare again"])
NAMES = ("data", "model", "tokenizer", "corpus")


def call(command: str, case: Case) -> int:
    main, argv = COMMANDS[command]
    return answer(main, argv, case).code


def read_manifest() -> dict:
    return json.loads((build_originals() / "data" / "manifest.json").read_text())


@pytest.mark.parametrize("command", COMMANDS)
def test_whole_folders_are_read(command):
    with open_case(*NAMES) as case:
        # The folder was made from other files than those given here.
        assert call(command, case) == (2 if command == "prepare again" else 0)


@cases(130)
@given(st.data(), commands)
def test_manifests(data, command):
    with open_case(*NAMES) as case:
        manifest = data.draw(damage_json(read_manifest()))
        (case.given / "data" / "manifest.json").write_text(json.dumps(manifest))
        call(command, case)


@cases(50)
@given(st.data(), commands)
def test_manifests_that_are_not_even_json(data, command):
    with open_case(*NAMES) as case:
        path = case.given / "data" / "manifest.json"
        content = data.draw(st.sampled_from(ODD_JSON_FILES) | damage_bytes(path.read_bytes()))
        path.write_bytes(content)
        call(command, case)


NAMES_ELSEWHERE = [
    "..",
    ".",
    "",
    "../../outside/secret_val_000000.npy",
    "/etc/hostname",
    "a/b",
    "x\0y",
    "a" * 300,
    "\ud800",
]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", NAMES_ELSEWHERE)
def test_names_outside_the_folder_are_rejected(name, command):
    with open_case(*NAMES) as case:
        manifest = read_manifest()
        name = str(case.outside / "secret_val_000000.npy") if name == "/etc/hostname" else name
        manifest["shards"][0]["file"] = manifest["shards"][1]["file"] = name
        (case.given / "data" / "manifest.json").write_text(json.dumps(manifest))
        assert call(command, case) == 2


class Trap:
    """Creates a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def build_arrays(case: Case) -> dict[str, bytes]:
    """Return valid `.npy` files that are not valid shards."""
    arrays = {
        "float": np.ones(400),
        "bytes": np.ones(400, np.uint8),
        "big-endian": np.ones(400, ">u2"),
        "signed": np.ones(400, np.int16),
        "2-D": np.ones((20, 20), np.uint16),
        "0-D": np.uint16(7),
        "empty": np.empty(0, np.uint16),
        "one token": np.full(1, EOT, np.uint16),
        "records": np.ones(100, [("a", "<u2"), ("b", "<u2")]),
        "text": np.array(["ab"] * 100),
        "objects": np.array([Trap(case.outside / "ran")] * 3),
        "ids beyond the vocabulary": np.full(600, 65535, np.uint16),
        "only end-of-text ids": np.full(600, EOT, np.uint16),
        "no end-of-text id": np.ones(600, np.uint16),
        "Fortran order": np.asfortranarray(np.ones(600, np.uint16)),
    }
    files = {}
    for name, array in arrays.items():
        stream = io.BytesIO()
        np.save(stream, array, allow_pickle=True)
        files[name] = stream.getvalue()
    stream = io.BytesIO()
    np.savez(stream, np.ones(400, np.uint16))
    header = b"\x93NUMPY\x01\x00"
    deep = b"(" * 9000
    return files | {
        "archive": stream.getvalue(),
        "pickle": pickle.dumps(Trap(case.outside / "ran")),
        "long header": header + len(deep).to_bytes(2, "little") + deep,
        "huge": files["no end-of-text id"]
        .replace(b"(600,)", b"(10**9,)")
        .replace(b"(600,)", b"(9999999999999999999,)"),
        "negative": files["no end-of-text id"].replace(b"(600,)", b"(-60,)"),
    }


@cases(120)
@given(st.data(), commands, st.booleans(), st.sampled_from([SHARD, "a_val_000000.npy"]))
def test_shards(data, command, has_manifest, name):
    with open_case(*NAMES) as case:
        path = case.given / "data" / name
        if not has_manifest:
            (case.given / "data" / "manifest.json").unlink()
        action = data.draw(st.sampled_from(["damage", "damage", "array", "no file"]))
        if action == "no file":
            replace_file(path, data.draw(st.sampled_from([*NO_FILES, "pipe"])), case.outside)
        elif action == "array":
            path.write_bytes(data.draw(st.sampled_from(sorted(build_arrays(case).items())))[1])
        else:
            path.write_bytes(data.draw(damage_bytes(path.read_bytes())))
        call(command, case)


@cases(50)
@given(st.data(), st.sampled_from(["plan", "train", "inspect", "verify", "measure"]))
def test_shards_of_llmc(data, command):
    with open_case("data", "model") as case:
        folder = case.given / "data"
        shutil.rmtree(folder)
        folder.mkdir()
        header = np.zeros(256, "<i4")
        header[:3] = 20240520, 1, 300
        whole = header.tobytes() + np.arange(300, dtype="<u2").tobytes()
        header[2] = 0
        (folder / "x_val_000000.bin").write_bytes(whole)
        content = data.draw(damage_bytes(whole, header=12) | st.sampled_from([whole, header.tobytes(), whole[:5]]))
        path = folder / "x_train_000001.bin"
        path.write_bytes(content)
        if data.draw(st.integers(0, 9)) == 0:
            replace_file(path, data.draw(st.sampled_from([*NO_FILES, "pipe"])), case.outside)
        call(command, case)


BASELINE = {
    "model": "gpt2",
    "val_checksums": ["sha256:0"],
    "eval_tokens": 16,
    "sequence_length": 8,
    "validation": {"val/loss": 3.0, "val/bpb": 1.0, "n_tokens": 16, "mixed_precision": "no", "date": "2026-01-01"},
    "hellaswag": {"items": "sha256:1", "name": "x", "limit": None, "protocol": "original", "acc_norm": 0.3, "n": 4},
}


@cases(60)
@given(st.one_of(damage_json([BASELINE]), st.sampled_from(ODD_JSON_FILES)))
@example([BASELINE | {"hellaswag": ["acc_norm"]}])
@example([BASELINE | {"validation": {"val/loss": 10**400}}])
def test_baselines(content):
    with open_case("data", "model") as case:
        path = case.given / "data" / "baselines.json"
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        before = path.read_bytes()
        if call("measure", case) == 2:
            assert path.read_bytes() == before


@pytest.mark.parametrize("number", ["3.2", float("nan"), float("inf"), 10**400, None, True, [1]], ids=str)
@pytest.mark.parametrize("part", [{"validation": "val/loss"}, {"hellaswag": "acc_norm"}], ids=str)
def test_non_numeric_baselines_are_rejected(part, number):
    ((name, key),) = part.items()
    with open_case("data", "model") as case:
        content = [BASELINE | {name: BASELINE[name] | {key: number}}]
        (case.given / "data" / "baselines.json").write_text(json.dumps(content))
        assert call("measure", case) == 2
