"""The model: exactly GPT-2's architecture, with the interface of a transformers model."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from tiny_models import (
    NO_SPECIAL_TOKENS,
    SHAPE,
    assert_close,
    build_model,
    build_pair,
    build_stock_model,
    draw_ids,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, AutoModelForCausalLM, GPT2Config, LlamaConfig

from modeling_gpt2_repro import MODEL_SIZES, GPT2ReproConfig, GPT2ReproForCausalLM, GPT2ReproModel
from modeling_gpt2_repro.model.folder import save_published_model
from modeling_gpt2_repro.modeling_gpt2_repro import HeadCrossEntropy

# A user without this package has only transformers and the folder.
WITHOUT_PACKAGE = """
import importlib.util, sys, torch
assert importlib.util.find_spec("modeling_gpt2_repro") is None
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
folder, trust = sys.argv[1], sys.argv[2] == "True"
config = AutoConfig.from_pretrained(folder, trust_remote_code=trust)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust)
trunk = AutoModel.from_pretrained(folder, trust_remote_code=trust)
ids = torch.arange(20)[None]
with torch.no_grad():
    torch.save((model(ids).logits, trunk(ids).last_hidden_state), "outputs.pt")
model.generate(ids, max_new_tokens=2)
print(type(config).__name__, type(model).__name__, type(trunk).__name__)
"""


@pytest.mark.parametrize("changes", [{}, {"n_layer": 1, "n_head": 1}, {"n_inner": 64, "n_positions": 33}])
def test_logits_and_gradients_equal_stock_gpt2(changes):
    (model, stock), ids = build_pair(**changes), draw_ids()
    assert list(model.state_dict()) == list(stock.state_dict())
    assert_close(model(ids).logits, stock(ids).logits)
    model(ids, labels=ids).loss.backward()
    stock(ids, labels=ids).loss.backward()
    for ours, theirs in zip(model.parameters(), stock.parameters(), strict=True):
        assert_close(ours.grad, theirs.grad)


def compute_plain_loss(model, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(model(ids).logits.flatten(0, 1), targets.flatten())


def test_shifted_labels_skip_the_logits_in_training():
    model, ids = build_model(), draw_ids()
    expected = compute_plain_loss(model, ids[:, :-1], ids[:, 1:])
    assert_close(model(ids, labels=ids).loss, expected)

    inputs, targets = ids[:, :-1], ids[:, 1:]
    for is_training, skip_logits, has_logits in (
        (False, None, True),
        (False, True, False),
        (True, None, False),
        (True, False, True),
    ):
        outputs = model.train(is_training)(inputs, shift_labels=targets.contiguous(), skip_logits=skip_logits)
        assert (outputs.logits is not None) == has_logits
        assert_close(outputs.loss, expected)
    assert model.train()(ids, labels=ids).logits is not None  # as any other model does


# 301 ids are padded to 384; 384 ids need no padding. 66 positions in chunks.
@pytest.mark.parametrize("chunk_tokens", [None, 1, 7, 66])
@pytest.mark.parametrize("vocab_size", [301, 384])
def test_chunked_loss_and_gradients_match_all_logits(vocab_size, chunk_tokens):
    model, ids = build_model(vocab_size=vocab_size), draw_ids()
    targets = draw_ids(seed=2)
    targets[0, 3:9] = targets[1, -1] = -100
    plain_loss = compute_plain_loss(model, ids, targets)
    expected = torch.autograd.grad(plain_loss, model.parameters())

    model.loss_chunk_tokens = chunk_tokens
    loss = model.train()(ids, shift_labels=targets).loss
    assert_close(loss, plain_loss)
    # A loss scale, as used with float16, must reach the gradients; so must a second use of the graph.
    for scale in (1.0, 1024.0):
        for ours, theirs in zip(
            torch.autograd.grad(scale * loss, model.parameters(), retain_graph=True), expected, strict=True
        ):
            torch.testing.assert_close(ours, scale * theirs, atol=1e-6 * scale, rtol=1e-4)


def test_padding_of_the_head_does_not_affect_the_loss():
    # Unmasked, the padding's logits of 0 would outweigh real ones of -50.
    states, weight = torch.ones(4, 16), torch.full((301, 16), -50 / 16)
    loss = HeadCrossEntropy.apply(states, weight, torch.arange(4), 4)
    assert_close(loss, torch.tensor(4 * math.log(301)))
    model = build_model()
    assert model(draw_ids()).logits.shape[-1] == model.get_output_embeddings().out_features == 301


class LargestTensor(TorchDispatchMode):
    """Records the largest number of elements of any float32 tensor while active."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        outputs = function(*args, **(kwargs or {}))
        for output in outputs if isinstance(outputs, (tuple, list)) else [outputs]:
            if isinstance(output, torch.Tensor) and output.dtype == torch.float32:
                self.numel = max(self.numel, output.numel())
        return outputs


def test_training_never_materializes_all_logits_in_float32():
    model, ids = build_model(n_positions=1024, vocab_size=1000), draw_ids(length=1024)
    n_logits = ids.numel() * 1000
    model.loss_chunk_tokens = 256
    with LargestTensor() as largest, torch.autocast("cpu", torch.bfloat16):
        model.train()(ids, shift_labels=ids).loss.backward()
    assert 0 < largest.numel < n_logits / 4
    with LargestTensor() as largest, torch.autocast("cpu", torch.bfloat16):
        model(ids, labels=ids)
    assert largest.numel >= n_logits  # else the mode records nothing


def test_validation_computes_no_gradients():
    model, ids = build_model(), draw_ids()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(ids, shift_labels=ids, skip_logits=True)
        flops = counter.get_total_flops()
        model(ids)
    # The same products as for the logits alone, except for padding 301 rows to 384.
    padding = 2 * ids.numel() * SHAPE["n_embd"] * (384 - 301)
    assert flops == counter.get_total_flops() - flops + padding


def test_chunks_under_autocast_are_as_exact_as_all_logits():
    generator = torch.Generator().manual_seed(0)
    states, weight = (torch.randn(n, 48, generator=generator) for n in (66, 301))
    weight, targets = (weight / 5).requires_grad_(), draw_ids().flatten()

    def compute_plain(states, weight):
        return torch.nn.functional.cross_entropy((states @ weight.t()).float(), targets, reduction="sum")

    (exact,) = torch.autograd.grad(compute_plain(states.double(), weight.double()), weight)
    with torch.autocast("cpu", torch.bfloat16):
        losses = [compute_plain(states, weight), HeadCrossEntropy.apply(states, weight, targets, 10)]
    assert losses[1].dtype == torch.float32
    plain_error, error = ((torch.autograd.grad(loss, weight)[0] - exact).norm() for loss in losses)
    assert 0 < error < 1.2 * plain_error  # an error of 0 would mean that nothing ran in bfloat16


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_packed_documents_do_not_attend_to_each_other(implementation):
    """Positions that restart mark the documents in a row, as in transformers' data collators."""
    model, ids = build_model(), draw_ids(batch=1)
    model.set_attn_implementation(implementation)
    positions = torch.cat([torch.arange(20), torch.arange(13)])[None]
    logits = model(ids, position_ids=positions, use_cache=False).logits
    assert_close(logits[:, :20], model(ids[:, :20]).logits)
    assert_close(logits[:, 20:], model(ids[:, 20:]).logits)


def test_a_compiled_training_step_attends_without_a_mask():
    """A mask costs memory, and time in torch's CPU kernel; causal attention needs none."""
    masks = []

    def record(graph, example_inputs):
        attention = torch.nn.functional.scaled_dot_product_attention
        masks.extend(node.kwargs.get("attn_mask") for node in graph.graph.nodes if node.target is attention)
        return graph.forward

    model, ids = build_model().train(), draw_ids()
    torch.compile(model, backend=record, fullgraph=True)(ids, shift_labels=ids, use_cache=False)
    assert masks == [None] * SHAPE["n_layer"]


def test_cached_generation_equals_recomputing_every_token():
    model, ids = build_model(), draw_ids(batch=1, length=7)
    generated = model.generate(ids, max_new_tokens=12, do_sample=False)
    for _ in range(12):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generated, ids)


@pytest.mark.parametrize(
    "size, expected", [("124M", 124_439_808), ("350M", 354_823_168), ("774M", 774_030_080), ("1558M", 1_557_611_200)]
)
def test_sizes_have_gpt2s_parameter_counts(size, expected):
    with torch.device("meta"):
        model = GPT2ReproForCausalLM(GPT2ReproConfig(**MODEL_SIZES[size]))
    assert model.num_parameters() == expected


def test_initial_standard_deviations():
    torch.manual_seed(0)
    shape = {"n_layer": 4, "n_head": 4, "n_embd": 256, "vocab_size": 1000}
    model = GPT2ReproForCausalLM(GPT2ReproConfig(**shape, bos_token_id=None, eos_token_id=None))
    expected = {"wte": 0.02, "wpe": 0.01, "c_attn": 0.02, "c_fc": 0.02, "c_proj": 0.02 / math.sqrt(2 * 4)}
    for name, parameter in model.named_parameters():
        kind, attribute = name.split(".")[-2:]
        if attribute == "bias":
            assert torch.all(parameter == 0), name
        elif kind.startswith("ln_"):
            assert torch.all(parameter == 1), name
        else:
            assert parameter.mean().item() == pytest.approx(0, abs=4e-4), name
            assert parameter.std().item() == pytest.approx(expected[kind], rel=0.02), name


def test_same_seed_same_weights():
    first, second, third = (build_fresh_model(seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.transformer.wte.weight, third.transformer.wte.weight)


def build_fresh_model(seed: int) -> GPT2ReproForCausalLM:
    torch.manual_seed(seed)
    return GPT2ReproForCausalLM(GPT2ReproConfig(**SHAPE, **NO_SPECIAL_TOKENS))


def test_saved_weights_are_reloaded_bit_for_bit(tmp_path):
    model, ids = build_model(), draw_ids()
    model.save_pretrained(tmp_path)
    for loaded in (GPT2ReproForCausalLM.from_pretrained(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert type(loaded) is GPT2ReproForCausalLM
        assert torch.equal(loaded(ids).logits, model(ids).logits)
        assert loaded.lm_head.weight is loaded.transformer.wte.weight
    assert type(AutoModel.from_pretrained(tmp_path)) is GPT2ReproModel


@pytest.mark.heavy
@pytest.mark.parametrize("form", ["native", "published"])
def test_a_folder_loads_without_the_package(form, tmp_path, tokenizer):
    model, ids = build_model(), torch.arange(20)[None]
    folder = tmp_path / "model"
    if form == "native":
        model.save_pretrained(folder)
    else:
        save_published_model(folder, model, tokenizer)
    script = tmp_path / "elsewhere.py"
    script.write_text(WITHOUT_PACKAGE)
    hidden = "GPT2ReproConfig GPT2ReproForCausalLM GPT2ReproModel"
    expected = {"True": hidden} | ({"False": "GPT2Config GPT2LMHeadModel GPT2Model"} if form == "published" else {})
    for trust, classes in expected.items():
        result = subprocess.run(
            # -I ignores PYTHONPATH and the working folder; the package may also be installed in editable mode, so its
            # finder is disabled as well.
            [sys.executable, "-I", "-c", HIDE_PACKAGE + WITHOUT_PACKAGE, str(folder), trust],
            env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr
        assert result.stdout.split("\n")[-2] == classes
        logits, hidden_states = torch.load(tmp_path / "outputs.pt")
        with torch.no_grad():
            torch.testing.assert_close(logits, model(ids).logits, atol=1e-5, rtol=0)
            torch.testing.assert_close(hidden_states, model.transformer(ids).last_hidden_state, atol=1e-5, rtol=0)


HIDE_PACKAGE = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "__editable__" not in str(finder)]
sys.path = [path for path in sys.path if "site-packages" in path or "lib" in path]
"""


def test_mistakes_are_explained_by_the_model():
    model, ids = build_model(), draw_ids(length=49)
    with pytest.raises(ValueError, match=r"49 tokens .* n_positions \(48\)"):
        model(ids)
    with pytest.raises(ValueError, match="input_ids and inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="input_ids and inputs_embeds"):
        model(ids[:, :4], inputs_embeds=torch.zeros(2, 4, 48))
    with pytest.raises(ValueError, match=r"n_embd \(48\) must be divisible by n_head \(5\)"):
        build_model(n_head=5)


def test_gpt2_folders_are_read_without_their_dropout_and_without_a_warning(tmp_path, caplog):
    stock = build_stock_model(resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1)
    stock.config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(written | {"resid_pdrop": 0.1}))  # OpenAI's files set it
    with caplog.at_level("WARNING"):
        config = GPT2ReproConfig.from_pretrained(tmp_path)
    assert not caplog.records
    assert (config.model_type, config.n_layer) == ("gpt2_repro", SHAPE["n_layer"])
    assert (config.resid_pdrop, config.embd_pdrop, config.attn_pdrop) == (0.0, 0.0, 0.0)
    assert GPT2ReproConfig.from_pretrained(tmp_path, resid_pdrop=0.1).resid_pdrop == 0.1


def test_own_dropout_is_kept_and_published_as_zero(tmp_path):
    model = build_model(resid_pdrop=0.2, attn_pdrop=0.1)
    model.save_pretrained(tmp_path / "native")
    assert GPT2ReproConfig.from_pretrained(tmp_path / "native").resid_pdrop == 0.2
    save_published_model(tmp_path / "published", model, None)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "published")
    assert (stock.config.resid_pdrop, stock.config.embd_pdrop, stock.config.attn_pdrop) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("option", ["scale_attn_by_inverse_layer_idx", "add_cross_attention"])
def test_unsupported_variants_of_gpt2_are_rejected(option, tmp_path):
    GPT2Config(**SHAPE, **NO_SPECIAL_TOKENS, **{option: True}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{option}=True is not supported"):
        GPT2ReproConfig.from_pretrained(tmp_path)


def test_other_architectures_and_shapes_are_rejected(tmp_path):
    LlamaConfig().save_pretrained(tmp_path / "llama")
    with pytest.raises(ValueError, match="is a llama model"):
        GPT2ReproForCausalLM.from_pretrained(tmp_path / "llama")
    build_model().save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"n_inner": 100}))
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        GPT2ReproForCausalLM.from_pretrained(tmp_path / "model")
    GPT2ReproForCausalLM.from_pretrained(tmp_path / "model", ignore_mismatched_sizes=True)
