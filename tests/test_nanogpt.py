"""Checkpoints of nanoGPT and build-nanogpt, in files as the two projects write them."""

import os
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_gpt2_repro.errors import UserError
from modeling_gpt2_repro.nanogpt import convert_state_dict, load_nanogpt, main

SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16}
GELUS = {"gelu": nn.GELU(), "gelu_new": nn.GELU(approximate="tanh")}


class Reference(nn.Module):
    """The function that both projects compute, under the names that both save, in plain torch."""

    def __init__(self, vocab_size=97, bias=True, gelu="gelu", mask=False, n_head=2, n_embd=32, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.n_head, self.gelu = n_head, GELUS[gelu]

        def norm():
            return nn.LayerNorm(n_embd, bias=bias)

        blocks = []
        for _ in range(SHAPE["n_layer"]):
            attn, mlp = nn.Module(), nn.Module()
            attn.c_attn = nn.Linear(n_embd, 3 * n_embd, bias=bias)
            attn.c_proj = nn.Linear(n_embd, n_embd, bias=bias)
            mlp.c_fc = nn.Linear(n_embd, 4 * n_embd, bias=bias)
            mlp.c_proj = nn.Linear(4 * n_embd, n_embd, bias=bias)
            if mask:
                attn.register_buffer("bias", torch.ones(1, 1, SHAPE["block_size"], SHAPE["block_size"]).tril())
            blocks.append(nn.ModuleDict({"ln_1": norm(), "attn": attn, "ln_2": norm(), "mlp": mlp}))
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocab_size, n_embd),
                "wpe": nn.Embedding(SHAPE["block_size"], n_embd),
                "h": nn.ModuleList(blocks),
                "ln_f": norm(),
            }
        )
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight
        for parameter in self.parameters():  # loud enough that the wrong GELU or a lost bias shows
            nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.3)

    @torch.no_grad()
    def forward(self, ids):
        batch, length = ids.shape
        x = self.transformer.wte(ids) + self.transformer.wpe.weight[:length]
        for block in self.transformer.h:
            heads = block.attn.c_attn(block.ln_1(x)).view(batch, length, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)
            y = nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
            x = x + block.attn.c_proj(y.transpose(1, 2).reshape(batch, length, -1))
            x = x + block.mlp.c_proj(self.gelu(block.mlp.c_fc(block.ln_2(x))))
        return self.lm_head(self.transformer.ln_f(x))


@dataclass
class GPTConfig:
    n_layer: int = SHAPE["n_layer"]
    n_head: int = SHAPE["n_head"]
    n_embd: int = SHAPE["n_embd"]
    block_size: int = SHAPE["block_size"]
    vocab_size: int = 97


def save_nanogpt(path, model, prefix="_orig_mod.", **changes):
    """Write what nanoGPT's train.py writes; a change to `None` takes a model argument out."""
    model_args = {**SHAPE, "bias": True, "vocab_size": model.lm_head.out_features, "dropout": 0.2} | changes
    optimizer = torch.optim.AdamW(model.parameters())
    model.lm_head.weight.sum().backward()
    optimizer.step()
    torch.save(
        {
            "model": {prefix + name: tensor for name, tensor in model.state_dict().items()},
            "optimizer": optimizer.state_dict(),
            "model_args": {name: value for name, value in model_args.items() if value is not None},
            "iter_num": 250,
            "best_val_loss": torch.tensor(3.5),
            "config": {"out_dir": "out", "n_layer": SHAPE["n_layer"], "compile": True},
        },
        path,
    )
    return path


def save_build_nanogpt(path, model, monkeypatch, module="__main__"):
    """Write what build-nanogpt's train_gpt2.py writes; pickle wants to find the class where it says it is."""
    monkeypatch.setattr(GPTConfig, "__module__", module)
    monkeypatch.setattr(sys.modules[module], "GPTConfig", GPTConfig, raising=False)
    config = GPTConfig(vocab_size=model.lm_head.out_features)
    torch.save({"model": model.state_dict(), "config": config, "step": 250, "val_loss": 3.5}, path)
    monkeypatch.delattr(sys.modules[module], "GPTConfig")  # who converts the file does not have the script
    return path


def draw_ids(vocab_size=97):
    return torch.randint(0, vocab_size, (2, 13), generator=torch.Generator().manual_seed(1))


def assert_same_function(model, reference, ids=None):
    ids = draw_ids() if ids is None else ids
    with torch.no_grad():
        logits = model(ids).logits
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, reference(ids)[..., : logits.shape[-1]], atol=1e-5, rtol=0)


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
    with pytest.raises(Exception, match="GPTConfig"):  # the file is a real one: plain reading refuses it
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
    assert "dropped: 47" in lines[-1]
    assert_same_function(model, reference, draw_ids(50257))
    assert load_nanogpt(path, None).config.vocab_size == 50304


@pytest.mark.parametrize(
    "gelu, mask, transposed", [("gelu", False, False), ("gelu_new", True, False), ("gelu_new", False, True)]
)
def test_bare_state_dict(tmp_path, gelu, mask, transposed):
    reference = Reference(gelu=gelu, mask=mask, n_embd=128)
    state_dict = reference.state_dict()
    if transposed:  # as transformers' GPT2LMHeadModel has it
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


def test_conversion_leaves_its_input_alone_and_makes_float32():
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
        (lambda weights: weights.update({"step": 3}), "has no weights"),
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
def test_weights_that_are_no_gpt2_are_refused_by_name(tmp_path, change, complaint):
    weights = {name: tensor.clone() for name, tensor in Reference().state_dict().items()}
    change(weights)
    torch.save({"model": weights, "model_args": {**SHAPE, "bias": True}}, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match=complaint) as raised:
        load_nanogpt(tmp_path / "ckpt.pt", None)
    assert "ckpt.pt" in str(raised.value)


@pytest.mark.parametrize(
    "changes, n_head, complaint",
    [
        ({"n_layer": 3}, None, "says n_layer 3, but its weights have 2"),
        ({"block_size": 32}, None, "says block_size 32, but its weights have 16"),
        ({"n_head": 5}, None, "32 cannot be divided among 5"),
        ({"n_head": "2"}, None, "cannot be divided"),
        ({}, 4, "says n_head 2, which --n_head 4 contradicts"),
        ({"n_head": None}, 0, "cannot be divided among 0"),
    ],
)
def test_contradictions_are_refused(tmp_path, changes, n_head, complaint):
    path = save_nanogpt(tmp_path / "ckpt.pt", Reference(), **changes)
    with pytest.raises(UserError, match=complaint):
        load_nanogpt(path, None, n_head=n_head)


def test_too_few_rows_for_the_tokenizer_are_refused(tmp_path, tokenizer):
    path = save_nanogpt(tmp_path / "ckpt.pt", Reference(vocab_size=65))
    with pytest.raises(UserError, match=r"65 token ids, but the tokenizer has 50,257.*--tokenizer none"):
        load_nanogpt(path, tokenizer)


class Bomb:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("place", ["config", "model_args"])
def test_code_in_a_file_is_not_run(tmp_path, place):
    path, target = tmp_path / "ckpt.pt", tmp_path / "ran"
    torch.save({"model": Reference().state_dict(), place: Bomb(target)}, path)
    with pytest.raises(UserError, match=r"would run code.*mkdir"):
        load_nanogpt(path, None)
    assert not target.exists()
    torch.load(path, weights_only=False)
    assert target.exists()  # so it would have


def test_a_class_that_calls_itself_gptconfig_is_not_imported(tmp_path, monkeypatch):
    """The name alone is known: a module of that name is never looked up, and a call of the class gives nothing."""
    (tmp_path / "evil.py").write_text("import os\nclass GPTConfig:\n    def __init__(self, *a): os.mkdir('ran')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    import evil

    class Call:
        def __reduce__(self):
            return evil.GPTConfig, ("argument",)

    torch.save({"model": Reference().state_dict(), "config": Call()}, "ckpt.pt")
    monkeypatch.delitem(sys.modules, "evil")
    with pytest.raises(UserError, match="not a whole file"):
        load_nanogpt("ckpt.pt", None)
    assert "evil" not in sys.modules
    assert not (tmp_path / "ran").exists()


def test_files_that_are_no_checkpoints_are_refused(tmp_path):
    whole = save_nanogpt(tmp_path / "whole.pt", Reference()).read_bytes()
    (tmp_path / "truncated.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.pt").write_text("not a checkpoint")
    (tmp_path / "empty.pt").touch()
    torch.save([torch.ones(2)], tmp_path / "list.pt")
    torch.save({"step": 3}, tmp_path / "dict.pt")
    torch.save({}, tmp_path / "nothing.pt")
    for name in ("truncated", "text", "empty", "list", "dict", "nothing", "absent"):
        with pytest.raises(UserError, match=f"{name}.pt"):
            load_nanogpt(tmp_path / f"{name}.pt", None)


def run_command(*arguments):
    command = [sys.executable, "-m", "modeling_gpt2_repro.nanogpt", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_command_writes_a_folder_that_stock_transformers_opens(tmp_path, tokenizer):
    reference, output = Reference(vocab_size=50304, bias=False, n_embd=16), tmp_path / "model"
    path = save_nanogpt(tmp_path / "ckpt.pt", reference, n_embd=16, bias=False)
    result = run_command("--checkpoint", path, "--output_dir", output)
    assert result.returncode == 0, result.stderr
    for line in ("n_layer: 2", "n_head: 2", "vocab_size: 50257", "activation taken: gelu, nanoGPT's", "dropped: 47"):
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
    arguments = ["--checkpoint", str(tmp_path / "weights.pt"), "--output_dir", str(output), "--tokenizer", "none"]
    arguments += ["--n_head", "2", "--activation_function", "gelu_new"]
    assert main(arguments) == 0
    assert "activation_function: gelu_new" in capsys.readouterr().out
    assert not list(output.glob("*token*")) and not list(output.glob("*vocab*"))
    stock = AutoModelForCausalLM.from_pretrained(output).eval()
    assert stock.config.eos_token_id is None and stock.generation_config.eos_token_id is None
    assert_same_function(stock, reference, draw_ids(65))

    assert main(arguments) == 2
    assert "exists already" in capsys.readouterr().err

    other = output.rename(f"{output}.partial")  # which may be somebody's
    assert main(arguments) == 2
    assert "exists already" in capsys.readouterr().err and (other / "config.json").exists()


def test_command_leaves_nothing_behind_when_it_refuses(tmp_path, capsys):
    (tmp_path / "ckpt.pt").write_text("not a checkpoint")
    assert main(["--checkpoint", str(tmp_path / "ckpt.pt"), "--output_dir", str(tmp_path / "model")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt.pt"]
