"""`train.py --eval_only`: any causal language model on the validation tokens and items of a run."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from tiny_models import build_stock_model, draw_ids
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import prepare_data
import train
from modeling_gpt2_repro.core.errors import UserError
from modeling_gpt2_repro.data.shards import BASELINES_NAME, list_checksums
from modeling_gpt2_repro.data.text_bytes import TextBytes
from modeling_gpt2_repro.data.tokenizer import load_data_tokenizer
from modeling_gpt2_repro.evaluation import baseline as baseline_module
from modeling_gpt2_repro.evaluation.hellaswag_data import SAMPLE_FILE
from modeling_gpt2_repro.training.eval_only import measure_validation
from modeling_gpt2_repro.training.inputs import Inputs

MEASURED = {
    "sequence_length": 32,
    "eval_tokens": 512,
    "hellaswag_file": SAMPLE_FILE,
    "hellaswag_limit": 6,
    "mixed_precision": "no",
    "report_to": "none",
}


def build_flags(data_dir: Path, **changes) -> list[str]:
    return [f"--{name}={value}" for name, value in {**MEASURED, "data_dir": data_dir, **changes}.items()]


def evaluate(data_dir: Path, model: Path | str, **changes) -> int:
    return train.main(["--eval_only", *build_flags(data_dir, init_from=model, **changes)])


def read_entries(data_dir: Path) -> list[dict]:
    return json.loads((data_dir / BASELINES_NAME).read_text())


def save_gpt2(folder: Path, tokenizer, **changes) -> Path:
    torch.manual_seed(0)
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 256, "initializer_range": 0.3, **changes}
    sizes["vocab_size"] = len(tokenizer)
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def data(shards, tmp_path) -> Path:
    return Path(shutil.copytree(shards, tmp_path / "data"))


@pytest.fixture(scope="module")
def tokenizer(shards):
    return load_data_tokenizer(shards)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory, tokenizer) -> Path:
    return save_gpt2(tmp_path_factory.mktemp("gpt2"), tokenizer)


@pytest.fixture(scope="module")
def trained(shards, tmp_path_factory) -> tuple[Path, dict]:
    """A short run and its last metrics."""
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 16, "max_steps": 2, "tokens_per_step": 256, "warmup_tokens": 0}
    rest = {"learning_rate": 2e-2, "compile": "off", "sample_every": 0, "output_dir": tmp_path_factory.mktemp("runs")}
    assert train.main(build_flags(shards, **shape, **rest, run_name="run")) == 0
    run = rest["output_dir"] / "run"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return run, next(line for line in lines if line["step"] == 2 and "val/loss" in line)


@pytest.mark.parametrize("folder", ["final", "checkpoints/step_0000002"])
def test_the_model_of_a_run_gets_the_scores_from_the_end_of_the_run(folder, trained, data, capsys):
    run, last = trained
    assert evaluate(data, run / folder) == 0
    (entry,) = read_entries(data)
    assert entry["validation"]["val/loss"] == pytest.approx(last["val/loss"], abs=1e-5)
    assert entry["validation"]["val/bpb"] == pytest.approx(last["val/bpb"], abs=1e-5)
    assert entry["hellaswag"]["acc_norm"] == last["hellaswag/acc_norm"]
    assert entry["hellaswag"]["acc"] == last["hellaswag/acc"]


def test_the_result_is_printed_and_stored_without_a_run_folder(gpt2, data, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert evaluate(data, gpt2) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["data"]

    (entry,) = read_entries(data)
    validation, hellaswag = entry["validation"], entry["hellaswag"]
    assert (entry["model"], entry["eval_tokens"], entry["sequence_length"]) == (str(gpt2), 512, 32)
    assert entry["val_checksums"] == list_checksums(data, "val")
    assert (validation["n_tokens"], validation["mixed_precision"], validation["date"][:2]) == (512, "no", "20")
    assert (hellaswag["n"], hellaswag["protocol"], hellaswag["limit"]) == (6, "original", 6)
    printed, errors = capsys.readouterr()
    rows = dict(line.strip().split(maxsplit=1) for line in printed.splitlines())
    assert rows["model"] == str(gpt2)
    assert rows["validation"] == "512 tokens in windows of 32"
    assert rows["loss"] == f"{validation['val/loss']:.4f} nats per token"
    assert rows["bpb"] == f"{validation['val/bpb']:.4f} bits per byte"
    assert rows["HellaSwag"] == f"first 6 items of {SAMPLE_FILE.name}, protocol original"
    assert (
        rows["acc_norm"] == f"{hellaswag['acc_norm']:.4f} ± {hellaswag['acc_norm_stderr']:.4f} (chance 0.25, 6 items)"
    )
    assert str(data / BASELINES_NAME) in printed
    assert "warning" not in errors


def test_the_loss_covers_the_first_validation_tokens(gpt2, data):
    """In windows that need not divide a training step, in batches of any size."""
    assert evaluate(data, gpt2, sequence_length=30, eval_tokens=499, micro_batch_size=5, hellaswag_every=0) == 0
    tokens = torch.from_numpy(np.load(data / "story_val_000000.npy").astype(np.int64))
    windows = torch.stack([tokens[30 * i : 30 * i + 31] for i in range(16)])
    with torch.no_grad():  # GPT2LMHeadModel shifts the labels itself
        expected = GPT2LMHeadModel.from_pretrained(gpt2)(input_ids=windows, labels=windows).loss.item()
    (entry,) = read_entries(data)
    assert entry["validation"]["n_tokens"] == 480
    assert entry["validation"]["val/loss"] == pytest.approx(expected, abs=1e-5)
    assert entry["hellaswag"] is None


def test_models_of_other_architectures_are_measured(data, tmp_path, tokenizer):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    assert evaluate(data, tmp_path / "llama", hellaswag_limit=2) == 0
    assert read_entries(data)[0]["validation"]["val/loss"] == pytest.approx(np.log(len(tokenizer)), abs=0.1)


def test_two_processes_give_the_same_result_as_one(gpt2, data, forks, tmp_path):
    assert evaluate(data, gpt2) == 0
    (alone,) = read_entries(data)
    (data / BASELINES_NAME).unlink()
    result = forks.launch(2, "train", ["--eval_only", *build_flags(data, init_from=gpt2)], tmp_path)
    assert result.code == 0, result.err
    assert "2 process(es)" in result.out
    assert result.out.count("nats per token") == 1
    (both,) = read_entries(data)
    for name in ("val/loss", "val/bpb", "n_tokens"):
        assert both["validation"][name] == pytest.approx(alone["validation"][name], abs=1e-6)
    for name in ("n", "acc", "acc_norm", "acc_norm_stderr"):
        assert both["hellaswag"][name] == pytest.approx(alone["hellaswag"][name], abs=1e-6)


def test_a_repeated_measurement_replaces_the_earlier_one(gpt2, data):
    assert evaluate(data, gpt2) == 0
    (before,) = read_entries(data)
    assert evaluate(data, gpt2, hellaswag_limit=2, eval_every=0) == 0
    (after,) = read_entries(data)
    assert after["hellaswag"]["n"] == 2
    assert {**after, "hellaswag": None} == {**before, "hellaswag": None}


def test_a_data_folder_that_cannot_be_written_does_not_lose_the_result(gpt2, data, capsys, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied", str(data / BASELINES_NAME))

    monkeypatch.setattr(baseline_module, "write_json", refuse)
    assert evaluate(data, gpt2, hellaswag_every=0) == 0
    printed, errors = capsys.readouterr()
    assert "nats per token" in printed and "kept in" not in printed
    (warning,) = [line for line in errors.splitlines() if "warning" in line]
    assert "the result was not stored" in warning and "Permission denied" in warning


def test_evaluating_leaves_the_prepared_data_valid(gpt2, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("One lighthouse, one keeper, many ships. " * 200)
    prepare = [f"--files={tmp_path / 'text.txt'}", f"--output_dir={tmp_path / 'data'}", "--val_tokens=200"]
    prepare.append(f"--tokenizer={gpt2}")
    assert prepare_data.main(prepare) == 0
    assert evaluate(tmp_path / "data", gpt2, hellaswag_every=0) == 0
    manifest = json.loads((tmp_path / "data" / "manifest.json").read_text())
    val_checksums = [shard["checksum"] for shard in manifest["shards"] if shard["split"] == "val"]
    assert read_entries(tmp_path / "data")[0]["val_checksums"] == val_checksums
    for flag in ("--verify", "--overwrite"):
        assert prepare_data.main([*prepare, flag]) == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"init_from": "scratch"}, "--eval_only needs a model: set --init_from"),
        ({"eval_every": 0, "hellaswag_every": 0}, "nothing to evaluate"),
        ({"sequence_length": 300, "eval_tokens": 300}, "--sequence_length 300 is longer than the 256 positions of"),
        ({"init_from": "./no_model"}, "--init_from ./no_model does not exist"),
        ({"data_dir": "nowhere"}, "there is no data folder nowhere"),
        ({"hellaswag_file": "missing.jsonl"}, "missing.jsonl"),
    ],
)
def test_mistakes_give_one_line(changes, message, gpt2, data, capsys):
    settings = {"init_from": gpt2, "data_dir": data, **changes}
    assert train.main(["--eval_only", *build_flags(settings.pop("data_dir"), **settings)]) == 2
    printed, errors = capsys.readouterr()
    assert printed == ""
    assert message in errors.splitlines()[-1]
    assert not (data / BASELINES_NAME).exists()


def test_a_model_with_another_tokenizer_is_rejected(data, tmp_path, tokenizer, capsys):
    folder = save_gpt2(tmp_path / "other", tokenizer)
    definition = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = definition["model"]["vocab"]
    vocabulary["Ġthe"], vocabulary["a"] = vocabulary["a"], vocabulary["Ġthe"]
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    assert evaluate(data, folder) == 2
    printed, errors = capsys.readouterr()
    assert printed == ""
    assert "has another tokenizer than" in errors.splitlines()[-1]


def test_a_damaged_baselines_file_is_reported_before_any_work(gpt2, data, capsys):
    (data / BASELINES_NAME).write_text("[{")
    assert evaluate(data, gpt2) == 2
    printed, errors = capsys.readouterr()
    assert printed == ""
    assert f"{data / BASELINES_NAME} is damaged" in errors.splitlines()[-1]
    assert (data / BASELINES_NAME).read_text() == "[{"


class CrowdedModel(torch.nn.Module):
    """A model on a device with memory for `n_rows` sequences."""

    def __init__(self, n_rows: int):
        super().__init__()
        self.model, self.n_rows, self.batch_sizes = build_stock_model(), n_rows, []

    def forward(self, input_ids, **kwargs):
        self.batch_sizes.append(len(input_ids))
        if len(input_ids) > self.n_rows:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return self.model(input_ids=input_ids, **kwargs)


def measure(model):
    windows = list(draw_ids(batch=8))
    inputs = Inputs(
        tokenizer=None,
        train_set=None,
        val_set=windows,
        eval_bytes=TextBytes(100, is_exact=True),
        n_eval_windows=8,
        hellaswag=None,
    )
    config = SimpleNamespace(sequence_length=len(windows[0]) - 1, micro_batch_size="8")
    return measure_validation(model, inputs, config, Accelerator())


def test_batches_shrink_when_memory_runs_out():
    torch.manual_seed(0)
    model = CrowdedModel(n_rows=3)
    result = measure(model)
    assert model.batch_sizes == [8, 4, 2, 2, 2, 2]
    model.n_rows = 8
    assert result.loss == pytest.approx(measure(model).loss, rel=1e-6)
    model.n_rows = 0
    with pytest.raises(UserError, match="a single sequence does not fit"):
        measure(model)


def test_a_loss_that_is_not_finite_is_rejected():
    model = build_stock_model()
    with torch.no_grad():
        model.transformer.ln_f.weight[0] = torch.nan
    with pytest.raises(UserError, match="loss is not finite"):
        measure(model)
