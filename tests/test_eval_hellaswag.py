"""The script: what it prints and writes, with one process and several, and its errors."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fork_server import CALL_MAIN
from small_runs import read_series, run_training
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import eval_hellaswag
from modeling_gpt2_repro.core.files import compute_checksum
from modeling_gpt2_repro.evaluation.hellaswag import HellaSwagResult
from modeling_gpt2_repro.evaluation.hellaswag_data import SAMPLE_FILE, load_hellaswag

pytestmark = pytest.mark.heavy

REPOSITORY = Path(eval_hellaswag.__file__).parent
LIMIT = 6


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("model")
    tokenizer.save_pretrained(folder)
    save_model(folder)
    return folder


def save_model(folder, **changes):
    torch.manual_seed(0)
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 256, "initializer_range": 0.3, **changes}
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(folder)


def run(*flags):
    return eval_hellaswag.main([str(flag) for flag in flags])


def sample_flags(model_folder, tmp_path):
    flags = {
        "model": model_folder,
        "data_file": SAMPLE_FILE,
        "limit": LIMIT,
        "batch_tokens": 512,
        "output": tmp_path / "new" / "results.json",
        "per_example": tmp_path / "new" / "examples.jsonl",
    }
    return [f"--{name}={value}" for name, value in flags.items()]


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_scores_are_printed_and_written_by_protocol(model_folder, tmp_path, capsys):
    assert run(*sample_flags(model_folder, tmp_path)) == 0
    results = json.loads((tmp_path / "new" / "results.json").read_text())
    examples = read_lines(tmp_path / "new" / "examples.jsonl")
    printed = capsys.readouterr().out
    assert SAMPLE_FILE.name in printed
    assert results["data"] == SAMPLE_FILE.name
    assert results["weights"] == compute_checksum(model_folder / "model.safetensors")
    for protocol in ("original", "lm_eval"):
        scores = results[protocol]
        accuracies = {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr"}
        assert scores.keys() == accuracies | {"n", "examples_per_second", "n_truncated"}
        assert scores["n"] == LIMIT
        assert scores["examples_per_second"] > 0
        own = [example for example in examples if example["protocol"] == protocol]
        assert [example["ind"] for example in own] == list(range(LIMIT))
        assert all(example.keys() == examples[0].keys() for example in own)
        assert all(example["predicted"] == example["nll"].index(min(example["nll"])) for example in own)
        for metric, field in (("acc", "predicted"), ("acc_norm", "predicted_norm")):
            assert scores[metric] == sum(example[field] == example["label"] for example in own) / LIMIT
            row = next(line.split() for line in printed.splitlines() if line.split()[:2] == [protocol, metric])
            expected = f"{scores[metric]:.4f} ± {scores[f'{metric}_stderr']:.4f} (chance 0.25, {LIMIT} items)"
            assert " ".join(row[2:]) == expected
    assert set(examples[0]) == {"protocol", "ind", "label", "nll", "predicted", "predicted_norm"}
    assert "GPT-2" not in printed


def test_one_protocol_in_bfloat16(model_folder, tmp_path, capsys):
    nll = {}
    for dtype in ("float32", "bfloat16"):
        assert run(*sample_flags(model_folder, tmp_path), "--protocol", "lm_eval", "--dtype", dtype) == 0
        assert f"({dtype})" in capsys.readouterr().out
        examples = read_lines(tmp_path / "new" / "examples.jsonl")
        assert {example["protocol"] for example in examples} == {"lm_eval"}
        nll[dtype] = examples[0]["nll"]
    assert "original" not in json.loads((tmp_path / "new" / "results.json").read_text())
    assert nll["bfloat16"] != pytest.approx(nll["float32"], abs=1e-3)
    assert nll["bfloat16"] == pytest.approx(nll["float32"], rel=0.05)


def test_published_scores_are_shown_for_the_full_validation_set_only():
    results = [
        HellaSwagResult(protocol, 10_042, 0.3, 0.0046, 0.31, 0.0046, scored_items=())
        for protocol in ("original", "lm_eval")
    ]
    text = eval_hellaswag.format_scores(results, with_published=True)
    scores, published = (part.splitlines() for part in text.split("\n\n"))
    assert scores[4].split()[:5] == ["lm_eval", "acc_norm", "0.3100", "±", "0.0046"]
    assert "(chance 0.25, 10,042 items)" in scores[4]
    assert [re.split("  +", line) for line in published[:6]] == [
        ["published", "original acc", "original acc_norm", "lm_eval acc", "lm_eval acc_norm"],
        ["GPT-2 124M", "0.2859", "0.2955", "0.2892", "0.3114"],
        ["GPT-2 350M", "-", "0.3752", "-", "-"],
        ["GPT-2 774M", "-", "0.4320", "-", "-"],
        ["GPT-2 1558M", "0.3842", "0.4893", "0.4004", "0.5089"],
        ["GPT-3 125M", "-", "0.3370", "-", "-"],
    ]
    assert "not measured here" in " ".join(published[6:])
    assert max(map(len, text.splitlines())) <= 80
    assert "GPT" not in eval_hellaswag.format_scores(results, with_published=False)
    assert "lm_eval" not in eval_hellaswag.format_scores(results[:1], with_published=True)


@pytest.fixture
def examples_alone(model_folder, tmp_path) -> bytes:
    """The examples file of a single process, which is removed again."""
    assert run(*sample_flags(model_folder, tmp_path)) == 0
    path = tmp_path / "new" / "examples.jsonl"
    content = path.read_bytes()
    path.unlink()
    return content


def test_several_processes_give_the_same_numbers(model_folder, tmp_path, forks, examples_alone):
    """Byte for byte, as each process computes the same batches on one thread; six items make more than two batches."""
    script = f"import accelerate\nassert accelerate.Accelerator().num_processes == 3\n{CALL_MAIN}"
    result = forks.launch(3, "eval_hellaswag", sample_flags(model_folder, tmp_path), tmp_path, script)
    assert result.code == 0, result.err
    assert result.out.count("protocol  metric") == 1
    assert (tmp_path / "new" / "examples.jsonl").read_bytes() == examples_alone


def test_the_launcher_gives_the_same_numbers(model_folder, tmp_path, examples_alone):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, accelerate, eval_hellaswag\n"
        "assert accelerate.Accelerator().num_processes == 2\n"
        "sys.exit(eval_hellaswag.main())\n"
    )
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2"]
    command = [*launcher, "--main_process_port=0", str(script), *sample_flags(model_folder, tmp_path)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(REPOSITORY)}
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("protocol  metric") == 1
    assert (tmp_path / "new" / "examples.jsonl").read_bytes() == examples_alone


@pytest.fixture(scope="module")
def finished_run(shards, tmp_path_factory):
    return run_training(shards, tmp_path_factory.mktemp("runs"), max_steps=6, sequence_length=128, tokens_per_step=512)


def score(model, tmp_path, *flags):
    """Score a model with the script; return the sums by protocol and item."""
    output = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
    data = ("--data_file", SAMPLE_FILE, "--limit", LIMIT, "--per_example", output)
    assert run("--model", model, *data, *flags) == 0
    return {(line["protocol"], line["ind"]): line["nll"] for line in read_lines(output)}


def assert_same_sums(ours, expected):
    assert ours.keys() == expected.keys() and len(ours) == 2 * LIMIT
    for key, nll in expected.items():
        assert ours[key] == pytest.approx(nll, abs=1e-3)


def test_a_checkpoint_and_its_published_form_have_the_same_scores(finished_run, tmp_path):
    checkpoint = score(finished_run / "checkpoints" / "step_0000006", tmp_path)
    assert_same_sums(score(finished_run / "final", tmp_path), checkpoint)
    assert_same_sums(score(finished_run / "final", tmp_path, "--trust_remote_code"), checkpoint)
    # The run scored itself the same: in both protocols at its end, and in one protocol before.
    last = read_series(finished_run, "hellaswag_lm_eval/acc_norm")
    assert list(last) == [6] and list(read_series(finished_run, "hellaswag/acc_norm")) == [0, 6]


def save_llama(folder, tokenizer):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.3, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return LlamaForCausalLM(config).from_pretrained(folder).eval()


@torch.no_grad()
def test_another_architecture_gets_the_scores_of_a_plain_computation(tokenizer, tmp_path, capsys):
    model = save_llama(tmp_path / "llama", tokenizer)
    scores = score(tmp_path / "llama", tmp_path)
    assert "attention mask" not in capsys.readouterr().err
    for item in load_hellaswag(SAMPLE_FILE, LIMIT):
        context_ids = tokenizer(item.ctx)["input_ids"]
        for ending, nll in zip(item.endings, scores["original", item.ind], strict=True):
            ending_ids = tokenizer(" " + ending)["input_ids"]
            logits = model(torch.tensor([context_ids + ending_ids])).logits[0, -len(ending_ids) - 1 : -1]
            expected = torch.nn.functional.cross_entropy(logits, torch.tensor(ending_ids), reduction="sum")
            assert nll == pytest.approx(expected.item(), abs=1e-3)


REMOTE_CODE = """
from transformers import GPT2Config, GPT2LMHeadModel

class SignedConfig(GPT2Config):
    model_type = "signed_gpt2"

class SignedModel(GPT2LMHeadModel):
    config_class = SignedConfig
"""


def test_the_code_of_a_model_runs_only_if_trusted(model_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = Path(shutil.copytree(model_folder, tmp_path / "remote"))
    config = json.loads((folder / "config.json").read_text())
    auto_map = {"AutoConfig": "signed.SignedConfig", "AutoModelForCausalLM": "signed.SignedModel"}
    config |= {"model_type": "signed_gpt2", "auto_map": auto_map}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "signed.py").write_text(REMOTE_CODE)
    assert "its own model code, which runs only with --trust_remote_code" in complain(
        capsys, "--model", folder, "--data_file", SAMPLE_FILE
    )
    assert_same_sums(score(folder, tmp_path, "--trust_remote_code"), score(model_folder, tmp_path))


def test_a_mistake_ends_a_process_with_code_2_and_one_line(tmp_path, forks):
    flags = ["--model", tmp_path / "no_model", "--data_file", SAMPLE_FILE]
    result = forks.run("eval_hellaswag", flags, tmp_path)
    assert (result.code, result.out) == (2, "")
    assert result.err.splitlines() == [
        f"eval_hellaswag.py: error: --model {tmp_path}/no_model does not exist: pass a model folder or a Hub id"
    ]


def complain(capsys, *flags):
    """Run with a mistake in the flags; return the one-line error."""
    assert run(*flags) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    return line


def copy_tokenizer(model_folder, folder):
    folder.mkdir()
    for file in model_folder.glob("*token*"):
        (folder / file.name).write_bytes(file.read_bytes())


def test_a_folder_without_model_or_tokenizer_is_rejected(model_folder, tmp_path, capsys):
    copy_tokenizer(model_folder, tmp_path / "no_model")
    data = ("--data_file", SAMPLE_FILE)
    line = complain(capsys, "--model", tmp_path / "no_model", *data)
    assert "cannot load a model from --model" in line
    save_model(tmp_path / "no_tokenizer")
    assert "has no tokenizer" in complain(capsys, "--model", tmp_path / "no_tokenizer", *data)


def test_a_model_that_does_not_match_its_tokenizer_is_rejected(model_folder, tmp_path, capsys):
    copy_tokenizer(model_folder, tmp_path / "small")
    save_model(tmp_path / "small", vocab_size=1000)
    line = complain(capsys, "--model", tmp_path / "small", "--data_file", SAMPLE_FILE)
    assert "embeddings for 1000 token ids, but its tokenizer produces id " in line
    # Gemma's tokenizer likewise has one id more than the model has rows; no text encodes to it.
    save_model(tmp_path / "small", vocab_size=50256)
    assert run("--model", tmp_path / "small", "--data_file", SAMPLE_FILE, "--limit", 1) == 0


def test_a_pickle_is_rejected(model_folder, tmp_path, capsys):
    copy_tokenizer(model_folder, tmp_path / "old")
    save_model(tmp_path / "old")
    (tmp_path / "old" / "model.safetensors").rename(tmp_path / "old" / "pytorch_model.bin")
    line = complain(capsys, "--model", tmp_path / "old", "--data_file", SAMPLE_FILE)
    assert "its weights are pickled" in line and "model.safetensors with save_pretrained" in line


@pytest.mark.parametrize("change", [{"n_layer": 2}, {"n_embd": 32}])
def test_incomplete_weights_are_rejected(model_folder, tmp_path, capsys, change):
    folder = tmp_path / "changed"
    copy_tokenizer(model_folder, folder)
    save_model(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    line = complain(capsys, "--model", folder, "--data_file", SAMPLE_FILE)
    assert "its config.json requires are missing or have another shape, such as transformer.h." in line


def test_bad_data_and_outputs_are_rejected_before_the_model_loads(tmp_path, capsys):
    (tmp_path / "bad.jsonl").write_text('{"ind": 1}\n')
    line = complain(capsys, "--model", "unused", "--data_file", tmp_path / "bad.jsonl")
    assert "bad.jsonl, line 1: the field `activity_label` is missing" in line
    assert "it is a folder" in complain(capsys, "--model", "unused", "--output", tmp_path)
    assert "--model" in complain(capsys, "--data_file", SAMPLE_FILE)


def test_unconnected_processes_are_rejected(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "the launcher started 2 processes" in complain(capsys, "--model", "unused", "--data_file", SAMPLE_FILE)
