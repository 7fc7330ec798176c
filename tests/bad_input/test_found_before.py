"""Regressions: input that once ended in a traceback, a hang, a crash or a lost file."""

import json
import shutil

import pytest
from cases import EOT, TINY, answer, build_originals, draw, open_case, to_flags
from test_flags import EVALUATE, PREPARE
from test_run_folders import LONGER

import eval_hellaswag
import prepare_data
import train
from modeling_gpt2_repro.__main__ import main as run_command
from modeling_gpt2_repro.core.errors import format_line

PLAN = TINY | {"plan": True}
LONG_NAME = "a" * 300

FLAGS = [
    # Loops and allocations proportional to the number.
    (train, PLAN | {"n_layer": 2**31}, "--n_layer must be 1,000 or less"),
    (
        train,
        PLAN | {"tokens_per_step": 2**60, "micro_batch_size": "auto"},
        "--tokens_per_step must be 1,073,741,824",
    ),
    (train, PLAN | {"sequence_length": 2**40, "eval_every": 0}, "--sequence_length must be 16,777,216 or less"),
    (train, TINY | {"n_embd": 2**17, "n_layer": 1000}, "GB, and this machine has"),
    (prepare_data, PREPARE | {"num_workers": 10**6}, "--num_workers must be 1,024 or less"),
    # Numbers too large for a float or an int64.
    (train, {**PLAN, "max_steps": 1, "epochs": 1e308}, "--epochs must be 1,000,000 or less"),
    (train, PLAN | {"max_steps": 10**40}, "invalid int value"),
    (train, PLAN | {"eval_tokens": "9" * 4000}, "invalid int value"),
    (train, PLAN | {"micro_batch_size": "9" * 5000}, "--micro_batch_size must be auto or at least 1"),
    (train, PLAN | {"micro_batch_size": "\uff11\uff12"}, "--micro_batch_size must be auto or at least 1"),
    (prepare_data, PREPARE | {"stage": "tokenize", "task": "0/" + "9" * 5000}, "must be i/N"),
    (prepare_data, PREPARE | {"shard_size": 2**63}, "--shard_size must be below 9,223,372,036,854,775,808"),
    (train, PLAN | {"learning_rate": "inf"}, "--learning_rate must be finite"),
    (train, PLAN | {"plan_tokens_per_second": "nan"}, "--plan_tokens_per_second must be 1 or more"),
    (train, TINY | {"seed": 2**63 - 1, "max_steps": 1}, None),
    (eval_hellaswag, EVALUATE | {"batch_tokens": 0}, "--batch_tokens must be 1 or more, not 0"),
    (eval_hellaswag, EVALUATE | {"limit": 0}, "--limit must be 1 or more, not 0"),
    # A run whose weights become NaN, or that makes no update at all.
    (train, TINY | {"learning_rate": 1e308, "max_steps": 1}, "not finite|non-finite"),
    (train, TINY | {"skip_steps": "1:2"}, "--skip_steps skips every update from 1 to 2"),
    # File names.
    (train, PLAN | {"data_dir": LONG_NAME}, "File name too long"),
    (train, TINY | {"run_name": LONG_NAME}, "File name too long"),
    (eval_hellaswag, EVALUATE | {"output": LONG_NAME}, "File name too long"),
    (eval_hellaswag, EVALUATE | {"data_file": "../given/loop"}, "Too many levels of symbolic links"),
    (prepare_data, PREPARE | {"output_dir": "../given/loop"}, "a link that points to itself"),
    (train, PLAN | {"data_dir": "caf\udce9"}, "valid UTF-8"),
    (eval_hellaswag, EVALUATE | {"output": "--"}, "--output: expected one value"),
    (eval_hellaswag, EVALUATE | {"output": "../given/items.jsonl"}, "must be different files"),
    (eval_hellaswag, EVALUATE | {"output": "x", "per_example": "x"}, "must be different files"),
    # Valid, but once rejected: a size that does not divide evenly among some of the plan's process counts.
    (train, PLAN | {"micro_batch_size": 2}, None),
]


@pytest.mark.parametrize(
    ("script", "settings", "message"), FLAGS, ids=lambda value: value[:30] if isinstance(value, str) else ""
)
def test_flags(script, settings, message):
    with open_case("data", "model", "items.jsonl", "corpus", "tokenizer") as case:
        given = answer(script.main, to_flags(settings), case)
        assert given.code == (0 if message is None else 2)
        assert message is None or any(part in given.err for part in message.split("|")), given.err


YAML = [
    (b'data_dir: "\\0"\n', "without null characters"),
    (b"skip_steps: ['--help']\n", "skip_steps must be a single value"),
    (b"skip_steps: [[a]]\n", "skip_steps must be a single value"),
    (b"skip_steps: &a [*a]\n", "is not valid YAML"),
    (b"n_layer: " + b"[" * 50_000, "is not valid YAML"),
]


@pytest.mark.parametrize(("content", "message"), YAML, ids=lambda value: repr(value[:30]))
def test_files_of_settings(content, message):
    with open_case("data") as case:
        (case.given / "settings.yaml").write_bytes(content)
        assert message in answer(train.main, ["--config=../given/settings.yaml", "--plan"], case).err


MANIFESTS = [
    {"shards": [{"file": 5, "split": "train", "documents": 1, "tokens": 1, "checksum": "x"}]},
    {"tokenizer": 5},
    {"tokenizer": ["x"]},
    {"vocab_size": "257"},
    {"vocab_size": 0},
    {"vocab_size": 10**9},
    {"eot_id": EOT + 1},
    {"settings": []},
    {"seed": -1},
    {"source": {"id": "files", "files": 5}},
    {"source": {"id": "files", "files": [{"bytes": 1}]}},
    {"source": []},
    {"shuffled": "no"},
]


READERS = {
    "plan": (train.main, to_flags(PLAN)),
    "verify": (prepare_data.main, ["--output_dir=../given/data", "--verify"]),
    "inspect": (prepare_data.main, ["--output_dir=../given/data", "--inspect=1"]),
}


@pytest.mark.parametrize("change", MANIFESTS, ids=str)
@pytest.mark.parametrize("reader", READERS)
def test_manifests(change, reader):
    with open_case("data") as case:
        path = case.given / "data" / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        main, argv = READERS[reader]
        assert "manifest.json is damaged" in answer(main, argv, case).err


RECORDS = [
    ("metrics.jsonl", ""),
    ("metrics.jsonl", '{"step": 1, "train/loss": "low", "val/loss": null}\n'),
    ("metrics.jsonl", '{"step": 1, "train/loss": 1e999}\n{"step": 1' + "0" * 400 + "}\n"),
    ("samples.jsonl", '{"step": 2, "text": "\\ud800"}\n{"step": 2}\n{"step": 2, "text": [1]}\n'),
]


@pytest.mark.parametrize(("name", "content"), RECORDS, ids=lambda value: value[:40])
def test_records_of_a_resumed_run(name, content):
    with open_case("data", "run") as case:
        run = case.folder / "cwd" / "runs" / "run"
        shutil.copytree(case.given / "run", run)
        shutil.rmtree(run / "final")
        (run / name).write_text(content)
        assert answer(train.main, to_flags(TINY | LONGER), case).code == 0
        assert (run / "final" / "README.md").exists()
        answer(run_command, ["summary", "runs/run"], case)
        answer(draw, ["runs/run"], case)  # there is nothing to draw if no line is valid


@pytest.mark.parametrize("settings", [{"n_samples": 0}, {"n_samples": -1}, {"top_k": 0}, {"n_tokens": 0}], ids=str)
def test_samples(settings):
    with open_case("model") as case:
        base = {"model": "../given/model", "prompt": "a", "n_tokens": 8}
        assert "must be 1 or more" in answer(run_command, ["sample", *to_flags(base | settings)], case).err


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "config.json", "model.safetensors"])
def test_damaged_models(file):
    with open_case("model", "items.jsonl", "data", "corpus") as case:
        (case.given / "model" / file).write_bytes(b'{"a": [1, {"b"')
        answer(eval_hellaswag.main, to_flags(EVALUATE), case)
        answer(train.main, to_flags(TINY | {"init_from": "../given/model"}), case)
        answer(train.main, to_flags(PLAN | {"init_from": "../given/model"}), case)
        answer(prepare_data.main, to_flags(PREPARE | {"tokenizer": "../given/model"}), case)


def test_an_error_is_one_line_without_control_characters():
    assert format_line("a\n b\x1b[31m \udcff") == "a b\\x1b[31m \\udcff"
    assert len(format_line("x" * 10**6)) < 2000
    assert format_line("caf\u00e9 \u65e5") == "caf\u00e9 \u65e5"


def test_the_originals_survive_these_tests():
    assert json.loads((build_originals() / "run" / "status.json").read_text())["status"] == "finished"


def test_originals_that_cannot_be_built_leave_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("prepare_data.main", lambda _: 2)
    with pytest.raises(AssertionError):
        build_originals.__wrapped__()
    assert not list(tmp_path.iterdir())
