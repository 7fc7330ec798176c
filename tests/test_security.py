"""The program runs no foreign code, reads and writes only the files it is given, and reveals no secrets."""

import ast
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import REPOSITORY
from loopback_hub import LoopbackHub, User
from transformers import GPT2Config, GPT2LMHeadModel

import eval_hellaswag
import train
from modeling_gpt2_repro import __main__ as commands
from modeling_gpt2_repro.core.files import compute_checksum
from modeling_gpt2_repro.evaluation.hellaswag_data import SAMPLE_FILE

FOLDERS = ("modeling_gpt2_repro", "benchmarks")
SOURCES = sorted([*REPOSITORY.glob("*.py"), *(path for name in FOLDERS for path in (REPOSITORY / name).rglob("*.py"))])
UNPICKLERS = {"pickle", "dill", "joblib", "cloudpickle", "shelve", "marshal"}
YAML_LOADERS = {"BaseLoader", "SafeLoader", "CBaseLoader", "CSafeLoader"}


def find_dangers(source: str) -> list[str]:
    """Return the line number and reason of each call in Python code that could run code from a file."""
    dangers = []

    def note(node: ast.AST, why: str) -> None:
        dangers.append(f"{node.lineno}: {why}")

    tree = ast.parse(source)
    # A class derived only from safe loaders is as safe as they are.
    loaders = YAML_LOADERS | {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        and {ast.unparse(base) for base in node.bases} & {f"yaml.{name}" for name in YAML_LOADERS}
        and len(node.bases) == 1
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            if UNPICKLERS & {module.split(".")[0] for module in modules}:
                note(node, "imports an unpickler")
        if isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "allow_pickle", "shell"):
            is_false = isinstance(node.value, ast.Constant) and not node.value.value
            # Only a user's setting, which is off by default, may enable a model's own code.
            is_passed_on = node.arg == "trust_remote_code" and not isinstance(node.value, ast.Constant)
            if not is_false and not is_passed_on:
                note(node.value, f"{node.arg} is on")
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if name.endswith("torch.load") and keywords.get("weights_only") != "True":
                note(node, "torch.load without weights_only=True")
            if name in ("eval", "exec", "compile", "__import__", "os.system", "os.popen"):
                note(node, name)
            if name.startswith("yaml.") and "load" in name and name not in ("yaml.safe_load", "yaml.safe_load_all"):
                loader = keywords.get("Loader") or (ast.unparse(node.args[1]) if len(node.args) > 1 else "")
                if loader.rpartition(".")[2] not in loaders:
                    note(node, "an unsafe YAML loader")
    return dangers


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_sources_run_no_code_from_files(path):
    assert find_dangers(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "code",
    [
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "torch.load(f, weights_only=is_safe)",
        "import pickle",
        "from dill import loads",
        "np.load(f, allow_pickle=True)",
        "np.load(f, allow_pickle=flag)",
        "yaml.load(f)",
        "yaml.load(f, Loader=yaml.Loader)",
        "yaml.load(f, yaml.UnsafeLoader)",
        "class L(yaml.Loader): pass\nyaml.load(f, L)",
        "class L(yaml.SafeLoader, yaml.Loader): pass\nyaml.load(f, L)",
        "yaml.unsafe_load(f)",
        "yaml.full_load(f)",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
        "eval(x)",
        "exec(open(x).read())",
        "os.system(x)",
        "subprocess.run(x, shell=True)",
    ],
)
def test_the_scan_finds_dangerous_calls(code):
    assert find_dangers(code) != []


def test_the_scan_accepts_safe_calls():
    safe = "torch.load(f, weights_only=True); yaml.safe_load(f); yaml.load(f, Loader=yaml.BaseLoader); model.eval()"
    assert find_dangers(safe + "; load(x, trust_remote_code=settings.trust_remote_code); re.compile('x')") == []
    assert find_dangers("class L(yaml.BaseLoader): pass\nyaml.load(f, Loader=L)") == []


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.fixture
def trap(tmp_path):
    """A trap, with a check after the test that it did not go off."""
    yield Trap(tmp_path / "ran")
    assert not (tmp_path / "ran").exists()
    pickle.loads(pickle.dumps(Trap(tmp_path / "ran"))).close()  # the trap does work
    assert (tmp_path / "ran").exists()


SMALL = {
    **{"n_layer": 1, "n_head": 1, "n_embd": 8, "sequence_length": 16, "tokens_per_step": 32, "max_steps": 2},
    **{"warmup_tokens": 32, "mixed_precision": "no", "compile": "off", "eval_every": 0, "hellaswag_every": 0},
    **{"sample_every": 0, "save_every": 1, "run_name": "run"},
}


def flags(**settings) -> list[str]:
    return [f"--{name}={value}" for name, value in {**SMALL, **settings}.items()]


def test_a_pickle_as_the_optimizers_state_is_rejected_unread(shards, tmp_path, trap, capsys):
    argv = flags(data_dir=shards, output_dir=tmp_path, report_to="none")
    assert train.main(argv) == 0
    shutil.rmtree(tmp_path / "run" / "final")
    for checkpoint in (tmp_path / "run" / "checkpoints").iterdir():
        state = checkpoint / "training_state"
        torch.save({"optimizer": trap, "scaler": trap}, state / "optimizer.pt")
        # An attacker would update the checksums, too.
        checksums = json.loads((state / "checksums.json").read_text())
        checksums["training_state/optimizer.pt"] = compute_checksum(state / "optimizer.pt")
        (state / "checksums.json").write_text(json.dumps(checksums))
    assert train.main(argv) == 2
    assert "optimizer.pt cannot be read" in capsys.readouterr().err


def test_a_pickle_as_a_shard_is_rejected_unread(gpt2_shards, tmp_path, trap, capsys):
    folder = tmp_path / "data"
    shutil.copytree(gpt2_shards, folder)
    np.save(folder / "story_train_000001.npy", np.array([trap], dtype=object), allow_pickle=True)
    assert train.main(flags(data_dir=folder, output_dir=tmp_path, report_to="none")) == 2
    (folder / "story_train_000001.npy").write_bytes(pickle.dumps(trap))
    assert train.main(flags(data_dir=folder, output_dir=tmp_path, report_to="none")) == 2
    assert capsys.readouterr().err.count("is not a complete .npy file") == 2


def test_a_pickle_as_a_nanogpt_checkpoint_is_rejected_unread(tmp_path, trap, capsys):
    for content in ({"model": trap}, {"model": {}, "config": trap}, trap):
        torch.save(content, tmp_path / "ckpt.pt")
        argv = ["convert", f"--checkpoint={tmp_path / 'ckpt.pt'}", f"--output_dir={tmp_path / 'out'}"]
        argv.append("--tokenizer=none")
        assert commands.main(argv) == 2
        assert "would run code" in capsys.readouterr().err
    (tmp_path / "ckpt.pt").write_bytes(pickle.dumps({"model": trap}))
    assert commands.main(argv) == 2
    assert not (tmp_path / "out").exists()


def test_tagged_yaml_runs_nothing(tmp_path, trap):
    (tmp_path / "settings.yaml").write_text(yaml.dump({"n_layer": trap}))
    assert "python/object/apply" in (tmp_path / "settings.yaml").read_text()
    assert train.main([f"--config={tmp_path / 'settings.yaml'}", "--plan"]) == 2


@pytest.fixture
def model_folder(tmp_path, tokenizer) -> Path:
    folder = tmp_path / "models" / "model"
    shape = {"n_layer": 1, "n_head": 1, "n_embd": 8, "n_positions": 16}
    GPT2LMHeadModel(GPT2Config(**shape)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def load_both_ways(folder: Path, shards: Path, tmp_path: Path, capsys) -> list[str]:
    """Pass a model folder to both scripts, which must reject it; return their messages."""
    shape = {"n_layer": 1, "n_head": 1, "n_embd": 8}
    argv = flags(data_dir=shards, output_dir=tmp_path, report_to="none", init_from=folder, **shape)
    messages = []
    for main, arguments in (
        (train.main, argv),
        (eval_hellaswag.main, [f"--model={folder}", f"--data_file={SAMPLE_FILE}", "--limit=1"]),
    ):
        assert main(arguments) == 2
        messages.append(capsys.readouterr().err)
    return messages


def test_pickled_weights_are_not_loaded(model_folder, gpt2_shards, tmp_path, trap, capsys):
    (model_folder / "model.safetensors").unlink()
    torch.save(trap, model_folder / "pytorch_model.bin")
    assert all(
        "model.safetensors" in message for message in load_both_ways(model_folder, gpt2_shards, tmp_path, capsys)
    )


def test_an_index_of_weights_cannot_lead_out_of_its_folder(model_folder, gpt2_shards, tmp_path, capsys):
    (model_folder / "model.safetensors").rename(model_folder.parent / "other.safetensors")
    names = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=8, n_positions=16)).state_dict()
    for name in ("../other.safetensors", str(model_folder.parent / "other.safetensors"), ".."):
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, name)}
        (model_folder / "model.safetensors.index.json").write_text(json.dumps(index))
        for message in load_both_ways(model_folder, gpt2_shards, tmp_path, capsys):
            assert "which is not a file" in message


def test_a_models_code_runs_only_when_allowed(model_folder, gpt2_shards, tmp_path, trap, capsys, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked a question in a non-interactive run"))
    (model_folder / "theirs.py").write_text(f"open({trap.path!r}, 'w')\n")
    for name, entry in (
        (
            "config.json",
            {"model_type": "theirs", "auto_map": {"AutoConfig": "theirs.C", "AutoModelForCausalLM": "theirs.M"}},
        ),
        ("tokenizer_config.json", {"tokenizer_class": "Theirs", "auto_map": {"AutoTokenizer": ["theirs.T", None]}}),
    ):
        path = model_folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | entry))
    load_both_ways(model_folder, gpt2_shards, tmp_path, capsys)


def test_names_in_manifests_and_training_states_stay_in_their_folder(gpt2_shards, tmp_path, capsys):
    """A training state contains no file names; a manifest does, and every other command reads it too (bad_input)."""
    secret, data = tmp_path / "secret", tmp_path / "data"
    shutil.copytree(gpt2_shards, data)
    (data / "story_train_000001.npy").rename(secret)
    counts = {"documents": 1, "tokens": 5000, "bytes": 1}
    manifest = {
        **{
            "source": {"id": "x"},
            "tokenizer": "gpt2",
            "tokenizer_fingerprint": "x",
            "vocab_size": 50257,
            "eot_id": 50256,
        },
        **{"seed": 1, "shuffled": True, "settings": {}, "read": counts, "train": counts, "format_version": 1},
        **{name: dict.fromkeys(counts, 0) for name in ("val", "validation_copies")},
        **{"duplicates": 0, "empty_documents": 0, "validation_ends_inside_document": False},
    }
    for name in ("../secret", str(secret), ".."):
        shard = {"file": name, "split": "train", "documents": 1, "tokens": 5000, "checksum": "x"}
        (data / "manifest.json").write_text(json.dumps(manifest | {"shards": [shard]}))
        assert train.main([*flags(data_dir=data, output_dir=tmp_path), "--plan"]) == 2
        assert "is not a file of its folder" in capsys.readouterr().err


SECRETS = {
    "HF_TOKEN": "hf_FAKEfakeFAKEfakeFAKEfakeFAKEfake12",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "MY_SERVICE_TOKEN": "tok-5f4dcc3b5aa765d61d8327deb882cf99",
}
NETRC_SECRET = "fedcba9876543210fedcba9876543210fedcba98"


def test_no_secret_is_revealed(gpt2_shards, tokenizer, tmp_path):
    """Run offline with wandb, and with a Hub to publish to, in a process whose environment and home contain keys."""
    home, runs = tmp_path / "home", tmp_path / "runs"
    (home / ".cache" / "huggingface").mkdir(parents=True)
    (home / ".netrc").write_text(f"machine api.wandb.ai\n  login user\n  password {NETRC_SECRET}\n")
    (home / ".netrc").chmod(0o600)
    (home / ".cache" / "huggingface" / "token").write_text(SECRETS["HF_TOKEN"])
    settings = {"eval_every": 1, "eval_tokens": 64, "sample_every": 1, "sample_tokens": 12, "report_to": "auto"}
    settings |= {"push_to_hub": True}
    command = [sys.executable, str(REPOSITORY / "train.py"), *flags(data_dir=gpt2_shards, output_dir=runs, **settings)]
    with LoopbackHub() as hub:
        hub.users = {SECRETS["HF_TOKEN"]: User("me")}
        tokenizer.save_pretrained(tmp_path / "tokenizer")
        files = {path.name: path.read_bytes() for path in (tmp_path / "tokenizer").iterdir()}
        hub.commit("models/openai-community/gpt2", files)
        environment = {**os.environ, **SECRETS, "HOME": str(home), "WANDB_MODE": "offline"}
        environment |= hub.environment(home / ".cache" / "huggingface")
        # A failed upload makes the run print an error about it.
        hub.fail("/commit/", "500", times=1)
        process = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, timeout=180)
        published = hub.repositories["models/me/run"]
    printed = process.stdout + process.stderr
    assert process.returncode == 0, printed
    written = {path: path.read_bytes() for path in runs.rglob("*") if path.is_file()}
    assert {"config.yaml", "metrics.jsonl", "README.md"} <= {path.name for path in written}
    assert any(path.suffix == ".wandb" for path in written)
    assert published.tags and b"publishing failed" in printed
    written |= {Path(sha, path): content for sha, tree in published.commits.items() for path, content in tree.items()}
    for secret in (*SECRETS.values(), NETRC_SECRET):
        assert secret.encode() not in printed
        assert [path for path, content in written.items() if secret.encode() in content] == []


def test_a_key_passed_as_a_setting_is_not_printed(tmp_path, capsys):
    key = SECRETS["HF_TOKEN"]
    (tmp_path / "settings.yaml").write_text(f"hf_token: {key}\n")
    for argv in (["--hf_token", key], [f"--hf_token={key}"], [f"--config={tmp_path / 'settings.yaml'}"]):
        assert train.main(argv) == 2
        error = capsys.readouterr().err
        assert "unknown setting" in error and key not in error
