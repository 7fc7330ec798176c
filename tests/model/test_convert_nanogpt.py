"""Converting checkpoints of nanoGPT, build-nanogpt and others, from files written as these projects write them."""

import argparse
import datetime
import subprocess
import sys
import types
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from nanogpt_files import SHAPE, Reference, assert_same_function, draw_ids, save_nanogpt
from transformers import AutoModelForCausalLM, AutoTokenizer

import train
from modeling_gpt2_repro.__main__ import main
from modeling_gpt2_repro.core.errors import UserError
from modeling_gpt2_repro.model.convert_nanogpt import convert_state_dict, load_nanogpt
from modeling_gpt2_repro.model.loading import load_causal_lm
from modeling_gpt2_repro.training.building import load_shape


@dataclass
class GPTConfig:
    n_layer: int = SHAPE["n_layer"]
    n_head: int = SHAPE["n_head"]
    n_embd: int = SHAPE["n_embd"]
    block_size: int = SHAPE["block_size"]
    vocab_size: int = 97


def save_build_nanogpt(path, model, monkeypatch, module="__main__"):
    """Write a checkpoint as build-nanogpt's train_gpt2.py does; pickle needs the class in the module that it names."""
    monkeypatch.setattr(GPTConfig, "__module__", module)
    monkeypatch.setattr(sys.modules[module], "GPTConfig", GPTConfig, raising=False)
    config = GPTConfig(vocab_size=model.lm_head.out_features)
    torch.save({"model": model.state_dict(), "config": config, "step": 250, "val_loss": 3.5}, path)
    monkeypatch.delattr(sys.modules[module], "GPTConfig")  # the script is missing at conversion
    return path


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("bias", [False, True])
def test_nanogpt(tmp_path, bias, prefix):
    reference = Reference(bias=bias)
    model = load_nanogpt(save_nanogpt(tmp_path / "ckpt.pt", reference, prefix, bias=bias), None)
    assert not model.training
    assert model.config.activation_function == "gelu"
    assert {model.config.embd_pdrop, model.config.resid_pdrop, model.config.attn_pdrop} == {0.0}
    assert_same_function(model, reference)


@pytest.mark.parametrize(
    "changes, asked, expected", [({"bias": None}, "auto", "gelu_new"), ({}, "gelu_new", "gelu_new")]
)
def test_nanogpt_with_the_older_gelu(tmp_path, changes, asked, expected):
    reference, lines = Reference(gelu="gelu_new", mask=True), []
    path = save_nanogpt(tmp_path / "ckpt.pt", reference, **changes)
    model = load_nanogpt(path, None, activation_function=asked, report=lines.append)
    assert model.config.activation_function == expected
    assert bool(lines) == (asked == "auto")
    assert_same_function(model, reference)


@pytest.mark.parametrize("module", ["__main__", "conftest"])
def test_build_nanogpt(tmp_path, monkeypatch, module):
    reference = Reference(gelu="gelu_new", mask=True)
    path = save_build_nanogpt(tmp_path / "model_19072.pt", reference, monkeypatch, module)
    with pytest.raises(Exception, match="GPTConfig"):  # like a real file, it does not load with weights_only
        torch.load(path, weights_only=True)
    lines = []
    model = load_nanogpt(path, None, report=lines.append)
    assert "gelu_new" in lines[0] and "build-nanogpt" in lines[0]
    assert_same_function(model, reference)


def test_padding_rows_are_dropped(tmp_path, tokenizer):
    reference = Reference(vocab_size=50304, n_embd=16)
    path, lines = save_nanogpt(tmp_path / "ckpt.pt", reference, n_embd=16), []
    model = load_nanogpt(path, tokenizer, report=lines.append)
    assert model.config.vocab_size == len(model.transformer.wte.weight) == len(model.lm_head.weight) == 50257
    assert model.config.eos_token_id == 50256
    assert "dropped" in lines[-1] and lines[-1].endswith(": 47")
    assert_same_function(model, reference, draw_ids(50257))
    assert load_nanogpt(path, None).config.vocab_size == 50304


@pytest.mark.parametrize(
    "gelu, mask, transposed", [("gelu", False, False), ("gelu_new", True, False), ("gelu_new", False, True)]
)
def test_bare_state_dict(tmp_path, gelu, mask, transposed):
    reference = Reference(gelu=gelu, mask=mask, n_embd=128)
    state_dict = reference.state_dict()
    if transposed:  # as in transformers' GPT2LMHeadModel
        state_dict = convert_state_dict(state_dict)
    torch.save(state_dict, tmp_path / "weights.pt")
    model = load_nanogpt(tmp_path / "weights.pt", None)
    assert model.config.n_head == 2
    assert_same_function(model, reference)


def test_bare_state_dict_of_another_head_width(tmp_path):
    reference = Reference(n_head=4)
    torch.save({"model": reference.state_dict()}, tmp_path / "weights.pt")
    with pytest.raises(UserError, match="--n_head"):
        load_nanogpt(tmp_path / "weights.pt", None)
    assert_same_function(load_nanogpt(tmp_path / "weights.pt", None, n_head=4), reference)


def test_conversion_keeps_its_input_and_returns_float32():
    state_dict = Reference(bias=False, mask=True).bfloat16().state_dict()
    names, weight = list(state_dict), state_dict["transformer.h.0.attn.c_proj.weight"].clone()
    converted = convert_state_dict(state_dict)
    assert list(state_dict) == names
    assert torch.equal(state_dict["transformer.h.0.attn.c_proj.weight"], weight)
    assert {tensor.dtype for tensor in converted.values()} == {torch.float32}
    assert torch.equal(converted["transformer.h.0.attn.c_proj.weight"], weight.float().T)
    assert not converted["transformer.h.1.attn.c_attn.bias"].any()
    assert "transformer.h.0.attn.bias" not in converted


C_PROJ = "transformer.h.1.mlp.c_proj.weight"
C_FC = "transformer.h.0.mlp.c_fc.weight"


@pytest.mark.parametrize(
    "change, complaint",
    [
        (lambda weights: weights.update({"lm_head.weight": weights["lm_head.weight"] + 1}), "lm_head.weight differs"),
        (lambda weights: weights.update({"transformer.h.1.attn.rope": torch.ones(2)}), r"it has \S+attn.rope"),
        (lambda weights: weights.pop(C_PROJ), f"lacks {C_PROJ}"),
        (lambda weights: weights.pop("transformer.h.0.ln_1.bias"), "lacks transformer.h.0.ln_1.bias"),
        (lambda weights: weights.pop("transformer.wpe.weight"), "no matrix transformer.wpe.weight"),
        (lambda weights: weights.update({C_PROJ: torch.ones(32, 64)}), rf"{C_PROJ} is \(32, 64\).*\(32, 128\)"),
        (lambda weights: weights.update({C_FC: torch.ones(96, 32)}), rf"{C_FC} is \(96, 32\)"),
        (lambda weights: weights.update({C_PROJ: torch.ones(32)}), rf"{C_PROJ} is \(32,\)"),
        (lambda weights: weights.update({"step": 3}), "contains no weights"),
    ],
    ids=[
        "untied",
        "unknown",
        "missing",
        "missing-bias",
        "no-positions",
        "shape",
        "mlp-width",
        "vector",
        "not-weights",
    ],
)
def test_weights_of_other_architectures_are_rejected(tmp_path, change, complaint):
    weights = {name: tensor.clone() for name, tensor in Reference().state_dict().items()}
    change(weights)
    torch.save({"model": weights, "model_args": {**SHAPE, "bias": True}}, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match=complaint) as raised:
        load_nanogpt(tmp_path / "ckpt.pt", None)
    assert "ckpt.pt" in str(raised.value)


@pytest.mark.parametrize(
    "changes, n_head, complaint",
    [
        ({"n_layer": 3}, None, "has n_layer 3, but its weights have 2"),
        ({"block_size": 32}, None, "has block_size 32, but its weights have 16"),
        ({"n_head": 5}, None, "n_embd 32 is not divisible by n_head 5"),
        ({"n_head": "2"}, None, "not divisible by n_head 2"),
        ({}, 4, "--n_head 4 contradicts .* n_head 2"),
        ({"n_head": None}, 0, "not divisible by n_head 0"),
    ],
)
def test_contradictory_shapes_are_rejected(tmp_path, changes, n_head, complaint):
    path = save_nanogpt(tmp_path / "ckpt.pt", Reference(), **changes)
    with pytest.raises(UserError, match=complaint):
        load_nanogpt(path, None, n_head=n_head)


def test_a_vocabulary_smaller_than_the_tokenizer_is_rejected(tmp_path, tokenizer):
    path = save_nanogpt(tmp_path / "ckpt.pt", Reference(vocab_size=65))
    with pytest.raises(UserError, match=r"65 token ids, but the tokenizer has 50,257.*--tokenizer none"):
        load_nanogpt(path, tokenizer)


def build_odd_values():
    """Return values that people keep beside the weights."""
    return {
        "best_val_loss": np.float64(3.5),
        "losses": [np.float32(3.5), torch.tensor(3.5), np.arange(3)],
        "rng": {
            "numpy": np.random.default_rng(0).bit_generator.state,
            "torch": torch.get_rng_state(),
            "legacy": np.array([1]),
        },
        "out_dir": Path("out") / "run",
        "betas": frozenset({0.9}),
        "history": defaultdict(list, {"loss": [1.0]}),
        "started": datetime.datetime(2024, 1, 1),
        "range": range(3),
        "dtype": torch.bfloat16,
        "size": torch.Size([2]),
    }


def wrap_in(key, prefix=""):
    def wrap(state_dict, **others):
        weights = {prefix + name: tensor for name, tensor in state_dict.items()}
        return {key: weights, **others} if key else weights

    return wrap


def name_as_fsdp(state_dict, **others):
    names = {
        name: name.replace(".h.", "._fsdp_wrapped_module.h.").replace(".mlp.", "._checkpoint_wrapped_module.mlp.")
        for name in state_dict
    }
    return {"model": {f"_fsdp_wrapped_module.{names[name]}": tensor for name, tensor in state_dict.items()}, **others}


def name_as_openai(state_dict, **others):
    """Use GPT-2's own layout and names, without the head."""
    converted = convert_state_dict(state_dict)
    del converted["lm_head.weight"]
    return {name.removeprefix("transformer."): tensor for name, tensor in converted.items()}


@pytest.mark.parametrize("is_legacy", [False, True])
@pytest.mark.parametrize(
    "wrap",
    [
        *(wrap_in(key) for key in ("model", "state_dict", "model_state_dict", "module", "weights", None)),
        wrap_in("model", "_orig_mod."),
        wrap_in("model", "module."),
        wrap_in("module", "module."),
        wrap_in("state_dict", "model."),
        wrap_in("state_dict", "model._orig_mod."),
        wrap_in("state_dict", "_forward_module.model."),
        name_as_fsdp,
        name_as_openai,
    ],
)
def test_common_checkpoint_layouts_are_converted(tmp_path, wrap, is_legacy):
    reference = Reference(gelu="gelu_new", mask=True)
    content = wrap(reference.state_dict(), **build_odd_values())
    torch.save(content, tmp_path / "model.ckpt", _use_new_zipfile_serialization=not is_legacy)
    model = load_nanogpt(tmp_path / "model.ckpt", None, n_head=2, activation_function="gelu_new")
    assert_same_function(model, reference)


def build_settings(kind, reference):
    fields = {**SHAPE, "vocab_size": reference.lm_head.out_features}
    if kind is not GPTConfig:
        return kind(**fields, out_dir=Path("out"), loss=np.float32(1.0))
    return GPTConfig(vocab_size=fields["vocab_size"])


@pytest.mark.parametrize("is_legacy", [False, True])
@pytest.mark.parametrize("kind", [dict, argparse.Namespace, types.SimpleNamespace, GPTConfig])
@pytest.mark.parametrize("key", ["config", "model_args", "args", "hyper_parameters"])
def test_the_shape_is_read_from_any_form_of_settings(tmp_path, kind, key, is_legacy):
    reference = Reference(n_head=4)
    content = {"model": reference.state_dict(), key: build_settings(kind, reference)}
    shape = vars(content[key]) if kind is not dict else content[key]
    shape["n_head"] = 4
    torch.save(content, tmp_path / "ckpt.pt", _use_new_zipfile_serialization=not is_legacy)
    model = load_nanogpt(tmp_path / "ckpt.pt", None, activation_function="gelu")
    assert model.config.n_head == 4
    assert_same_function(model, reference)
    shape["n_layer"] = 3
    torch.save(content, tmp_path / "ckpt.pt", _use_new_zipfile_serialization=not is_legacy)
    with pytest.raises(UserError, match="has n_layer 3, but its weights have 2"):
        load_nanogpt(tmp_path / "ckpt.pt", None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_safetensors_and_other_precisions(tmp_path, dtype):
    reference = Reference(gelu="gelu_new").to(dtype)
    tensors = {name: tensor.contiguous() for name, tensor in name_as_openai(reference.state_dict()).items()}
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    model = load_nanogpt(tmp_path / "model.safetensors", None, n_head=2)
    assert model.config.activation_function == "gelu_new"
    assert_same_function(model, reference.float())


def test_a_checkpoint_given_as_a_model_folder_suggests_converting_it(tmp_path, shards):
    path = save_nanogpt(tmp_path / "ckpt.pt", Reference())
    for load in (
        load_causal_lm,
        load_shape,
        lambda name: train.main([f"--init_from={name}", f"--data_dir={shards}", f"--output_dir={tmp_path}"]),
    ):
        try:
            assert load(str(path)) == 2
        except UserError as error:
            assert "modeling_gpt2_repro convert --checkpoint" in str(error)


def run_command(*arguments):
    command = [sys.executable, "-m", "modeling_gpt2_repro", "convert", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.heavy
def test_command_writes_a_folder_that_stock_transformers_loads(tmp_path, tokenizer):
    reference, output = Reference(vocab_size=50304, bias=False, n_embd=16), tmp_path / "model"
    path = save_nanogpt(tmp_path / "ckpt.pt", reference, n_embd=16, bias=False)
    result = run_command("--checkpoint", path, "--output_dir", output)
    assert result.returncode == 0, result.stderr
    for line in ("n_layer: 2", "n_head: 2", "vocab_size: 50257", "activation: gelu, nanoGPT's", "ids: 47"):
        assert line in result.stdout
    stock = AutoModelForCausalLM.from_pretrained(output)
    assert type(stock).__name__ == "GPT2LMHeadModel"
    assert stock.config.activation_function == "gelu"
    assert f"parameters: {stock.num_parameters():,}" in result.stdout
    assert_same_function(stock.eval(), reference, draw_ids(50257))
    assert AutoTokenizer.from_pretrained(output)("Hello")["input_ids"] == tokenizer("Hello")["input_ids"]


def test_command_without_a_tokenizer(tmp_path, capsys):
    reference, output = Reference(vocab_size=65, gelu="gelu_new"), tmp_path / "model"
    torch.save(reference.state_dict(), tmp_path / "weights.pt")
    arguments = [
        "convert",
        "--checkpoint",
        str(tmp_path / "weights.pt"),
        "--output_dir",
        str(output),
        "--tokenizer",
        "none",
    ]
    arguments += ["--n_head", "2", "--activation_function", "gelu_new"]
    assert main(arguments) == 0
    assert "activation_function: gelu_new" in capsys.readouterr().out
    assert not list(output.glob("*token*")) and not list(output.glob("*vocab*"))
    stock = AutoModelForCausalLM.from_pretrained(output).eval()
    assert stock.config.eos_token_id is None and stock.generation_config.eos_token_id is None
    assert_same_function(stock, reference, draw_ids(65))

    assert main(arguments) == 2
    assert "already exists" in capsys.readouterr().err

    other = output.rename(f"{output}.partial")  # may belong to somebody else
    assert main(arguments) == 2
    assert "already exists" in capsys.readouterr().err and (other / "config.json").exists()


def test_command_leaves_nothing_behind_after_an_error(tmp_path, capsys):
    (tmp_path / "ckpt.pt").write_text("not a checkpoint")
    assert main(["convert", "--checkpoint", str(tmp_path / "ckpt.pt"), "--output_dir", str(tmp_path / "model")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt.pt"]
