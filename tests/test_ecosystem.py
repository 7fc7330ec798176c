"""The model in the tools of the ecosystem: compilers, loaders, offloading, pipelines and Trainer."""

import shutil

import pytest
import torch
from accelerate import init_empty_weights, load_checkpoint_and_dispatch
from safetensors.torch import load_file, save_file
from tiny_models import SHAPE, assert_close, build_model, build_pair, build_stock_model, draw_ids
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, GPT2LMHeadModel, GPT2Model, StaticCache, Trainer, TrainingArguments, pipeline

from modeling_gpt2_repro import GPT2ReproForCausalLM, GPT2ReproModel
from modeling_gpt2_repro.core.devices import can_compile
from modeling_gpt2_repro.model.folder import save_model, save_published_model

pytestmark = pytest.mark.heavy

SHAPES = {
    "tied": {},
    "one head": {"n_layer": 1, "n_head": 1},
    "narrow MLP": {"n_layer": 2, "n_inner": 64, "n_positions": 33},
    "untied": {"tie_word_embeddings": False},
}
needs_compiler = pytest.mark.skipif(
    not can_compile(torch.device("cpu")), reason="torch.compile needs a C++ compiler on a CPU"
)
LEFT_PADDING = torch.tensor([[0, 0, 0] + [1] * 6, [1] * 9])


def split_window(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_ids": ids[:, :-1], "shift_labels": ids[:, 1:].contiguous()}


def compute_gradients(model, **inputs) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def compute_relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.float() - expected).norm() / expected.norm()).item()


def load_completely(model_class, folder):
    model, info = model_class.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model


# Compilers


@needs_compiler
def test_compiled_forward_equals_eager_at_every_length():
    model = build_model(n_layer=1)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for length in (9, 17, 48):
            assert_close(compiled(draw_ids(2, length)).logits, model(draw_ids(2, length)).logits)
        # fullgraph wraps every exception in its own, which contains our message.
        with pytest.raises(Exception, match=r"n_positions \(48\)"):
            compiled(draw_ids(2, 49))


@needs_compiler
def test_compiled_training_step_equals_eager():
    model, window = build_model(n_layer=1).train(), split_window(draw_ids())
    loss, expected = model(**window).loss, compute_gradients(model, **window)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    gradients = compute_gradients(compiled, **window)
    assert_close(compiled(**window).loss, loss)
    for name, gradient in expected.items():
        assert_close(gradients["_orig_mod." + name], gradient)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_compiled_decoding_is_one_graph(cache):
    model, ids = build_model(n_layer=1), draw_ids(2, 9)
    past_key_values = (
        DynamicCache(config=model.config) if cache == "dynamic" else StaticCache(model.config, max_cache_len=20)
    )
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")  # only tracing is tested
    with torch.no_grad():
        logits = [model(ids[:, :5], past_key_values=past_key_values).logits]
        for position in range(5, 9):
            one_id = ids[:, position : position + 1]
            logits.append(compiled(one_id, past_key_values=past_key_values).logits)
        assert_close(torch.cat(logits, dim=1), model(ids).logits)


def test_exported_program_accepts_any_batch_and_length():
    model = build_model()
    axes = {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("sequence", max=SHAPE["n_positions"])}
    program = torch.export.export(
        model,
        (),
        {"input_ids": draw_ids(2, 9), "attention_mask": LEFT_PADDING, "use_cache": False},
        dynamic_shapes={"input_ids": axes, "attention_mask": axes, "use_cache": None},
    ).module()
    for batch, length in ((2, 9), (3, 17), (1, 48)):
        ids, mask = draw_ids(batch, length), torch.ones(batch, length, dtype=torch.long)
        mask[0, :2] = 0
        logits = program(input_ids=ids, attention_mask=mask, use_cache=False).logits
        assert_close(logits[mask.bool()], model(ids, attention_mask=mask).logits[mask.bool()])


# Attention, precision and memory


@pytest.mark.parametrize("implementation", ["eager", "flex_attention"])
@pytest.mark.parametrize("padding", [None, LEFT_PADDING], ids=["unpadded", "left-padded"])
def test_attention_implementations_agree_with_sdpa(implementation, padding):
    ids, tokens = draw_ids(2, 9), torch.ones(2, 9).bool() if padding is None else padding.bool()
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # flex attention compiles itself, which is slow
        expected = build_model()(ids, attention_mask=padding).logits
        model = GPT2ReproForCausalLM._from_config(build_model().config, attn_implementation=implementation).eval()
        model.load_state_dict(build_model().state_dict())
        assert model.config._attn_implementation == implementation
        assert_close(model(ids, attention_mask=padding).logits[tokens], expected[tokens])
        generated = model.generate(ids, attention_mask=padding, max_new_tokens=5, do_sample=False)
        assert torch.equal(
            generated, build_model().generate(ids, attention_mask=padding, max_new_tokens=5, do_sample=False)
        )


@needs_compiler
def test_compiled_flex_attention_agrees_with_sdpa():
    model, ids = build_model(n_layer=1), draw_ids(2, 9)
    with torch.no_grad():
        expected = model(ids).logits
        model.set_attn_implementation("flex_attention")
        assert_close(model(ids).logits, expected)


def test_bfloat16_is_close_to_float32_and_survives_a_round_trip(tmp_path):
    model, ids = build_model(), draw_ids()
    model.save_pretrained(tmp_path / "float32")
    half = GPT2ReproForCausalLM.from_pretrained(tmp_path / "float32", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert half(ids).logits.dtype == torch.bfloat16
    assert compute_relative_error(half(ids).logits, model(ids).logits) < 0.03

    half.save_pretrained(tmp_path / "bfloat16")
    for form, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        assert GPT2ReproForCausalLM.from_pretrained(tmp_path / form, dtype="auto").dtype == dtype
    loaded = GPT2ReproForCausalLM.from_pretrained(tmp_path / "bfloat16", dtype="auto")
    assert torch.equal(loaded(ids).logits, half(ids).logits)


@pytest.mark.parametrize("targets", ["labels", "shift_labels"])
def test_training_step_under_autocast(targets):
    model, ids = build_model().train(), draw_ids()
    inputs = split_window(ids) if targets == "shift_labels" else {"input_ids": ids, "labels": ids}
    loss, expected = model(**inputs).loss, compute_gradients(model, **inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(**inputs)
    assert outputs.loss.dtype == torch.float32
    assert_close(outputs.loss, loss, atol=0.01)
    model.zero_grad()
    outputs.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == torch.float32
        assert compute_relative_error(parameter.grad, expected[name]) < 0.08, name


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("targets", ["labels", "shift_labels"])
def test_gradient_checkpointing_recomputes_the_same_numbers(use_reentrant, targets):
    model, ids, calls = build_model().train(), draw_ids(), []
    inputs = split_window(ids) if targets == "shift_labels" else {"input_ids": ids, "labels": ids}
    loss, expected = model(**inputs).loss, compute_gradients(model, **inputs)
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    model.transformer.h[1].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    gradients = compute_gradients(model, **inputs)
    assert len(calls) == 2
    assert torch.equal(model(**inputs).loss, loss)
    for name, gradient in expected.items():
        assert_close(gradients[name], gradient, atol=1e-6)


@pytest.mark.parametrize("vocab_size", [310, 256])
def test_resized_vocabulary_stays_tied_trains_and_reloads(vocab_size, tmp_path):
    model, ids = build_model(), draw_ids() % 256
    n_kept = min(vocab_size, SHAPE["vocab_size"])
    with torch.no_grad():
        before = model(ids).logits
    model.resize_token_embeddings(vocab_size)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.lm_head.weight.shape[0] == model.lm_head.out_features == model.config.vocab_size == vocab_size
    assert model(ids).logits.shape[-1] == vocab_size
    assert_close(model(ids).logits[..., :n_kept], before[..., :n_kept])

    ids[:, -1] = vocab_size - 1  # rows that were added must be valid targets
    window = split_window(ids)
    expected = cross_entropy(model(window["input_ids"]).logits.flatten(0, 1), window["shift_labels"].flatten())
    loss = model.train()(**window).loss
    assert_close(loss, expected)
    loss.backward()
    assert model.lm_head.weight.grad[vocab_size - 1].abs().max() > 1e-3

    model.save_pretrained(tmp_path)
    loaded = load_completely(GPT2ReproForCausalLM, tmp_path)
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)


# Files


@pytest.mark.parametrize("shape", SHAPES)
def test_sharded_files_load_in_both_classes(shape, tmp_path):
    (model, stock), ids = build_pair(**SHAPES[shape]), draw_ids()
    with torch.no_grad():
        expected = stock(ids).logits
        for name, saved in (("ours", model), ("stock", stock)):
            saved.save_pretrained(tmp_path / name, max_shard_size="60KB")
            assert len(list((tmp_path / name).glob("*.safetensors"))) > 2
            for model_class in (GPT2ReproForCausalLM, GPT2LMHeadModel):
                loaded = load_completely(model_class, tmp_path / name)
                assert_close(loaded(ids).logits, expected)
                tied = loaded.lm_head.weight is loaded.transformer.wte.weight
                assert tied is SHAPES[shape].get("tie_word_embeddings", True)


def test_trunks_without_a_head_load_in_both_classes(tmp_path):
    (model, stock), ids = build_pair(), draw_ids()
    model.transformer.save_pretrained(tmp_path / "ours")
    stock.transformer.save_pretrained(tmp_path / "stock")
    with torch.no_grad():
        for folder in (tmp_path / "ours", tmp_path / "stock"):
            assert_close(load_completely(GPT2ReproForCausalLM, folder)(ids).logits, stock(ids).logits)
            for trunk_class in (GPT2ReproModel, GPT2Model):
                hidden_states = load_completely(trunk_class, folder)(ids).last_hidden_state
                assert_close(hidden_states, stock.transformer(ids).last_hidden_state)


def test_openais_own_files_load_without_a_warning(tmp_path):
    """These have no prefix and no head, and each attention module has the causal mask as a buffer."""
    stock, ids = build_stock_model(), draw_ids()
    tensors = {name: tensor.clone() for name, tensor in stock.transformer.state_dict().items()}
    for layer in range(SHAPE["n_layer"]):
        tensors[f"h.{layer}.attn.bias"] = torch.ones(48, 48).tril()[None, None]
        tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    assert "wte.weight" in tensors
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    stock.config.to_json_file(tmp_path / "config.json")
    with torch.no_grad():
        assert_close(load_completely(GPT2ReproForCausalLM, tmp_path)(ids).logits, stock(ids).logits)


def test_published_file_is_the_file_that_stock_gpt2_writes(tmp_path, tokenizer):
    model, stock = build_pair()
    save_published_model(tmp_path / "ours", model, tokenizer)
    stock.save_pretrained(tmp_path / "stock")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "stock"))
    assert {name: tensor.shape for name, tensor in ours.items()} == {name: x.shape for name, x in theirs.items()}
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("device_map", ["auto", {"transformer": "cpu", "lm_head": "cpu"}, {"": "cpu"}], ids=str)
def test_device_maps(device_map, tmp_path):
    model, ids = build_model(), draw_ids()
    model.save_pretrained(tmp_path)
    loaded = GPT2ReproForCausalLM.from_pretrained(tmp_path, device_map=device_map)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_blocks_offloaded_to_disk_compute_the_same(tmp_path):
    model, ids = build_model(), draw_ids(2, 9)
    model.save_pretrained(tmp_path / "model")
    expected = model(ids).logits
    # Room for the embeddings and one block, so `auto` must offload the other blocks to disk.
    automatic = GPT2ReproForCausalLM.from_pretrained(
        tmp_path / "model", device_map="auto", max_memory={"cpu": 300_000}, offload_folder=tmp_path / "offload"
    )
    with init_empty_weights():
        explicit = GPT2ReproForCausalLM(model.config)
    explicit.tie_weights()
    places = dict.fromkeys(["transformer.wte", "transformer.wpe", "transformer.h.0", "lm_head"], "cpu")
    places |= dict.fromkeys(["transformer.h.1", "transformer.h.2", "transformer.ln_f"], "disk")
    explicit = load_checkpoint_and_dispatch(
        explicit, tmp_path / "model", device_map=places, offload_folder=tmp_path / "dispatched"
    )
    for loaded in (automatic, explicit):
        on_disk = {name.split(".h.")[1][0] for name, x in loaded.named_parameters() if x.is_meta and ".h." in name}
        assert on_disk == {"1", "2"}
        assert torch.equal(loaded(ids).logits, expected)
        generated = loaded.generate(ids, max_new_tokens=5, do_sample=False)
        assert torch.equal(generated, model.generate(ids, max_new_tokens=5, do_sample=False))


# Pipelines and Trainer


def test_text_generation_pipeline_loads_both_forms(tmp_path, tokenizer):
    model = build_model(vocab_size=len(tokenizer), n_layer=1, n_embd=16)
    prompt = tokenizer("The old lighthouse", return_tensors="pt")
    ids = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    for save, model_class in ((save_model, GPT2ReproForCausalLM), (save_published_model, GPT2LMHeadModel)):
        save(tmp_path / save.__name__, model, tokenizer)
        generator = pipeline("text-generation", model=str(tmp_path / save.__name__))
        assert type(generator.model) is model_class
        text = generator("The old lighthouse", max_new_tokens=8, do_sample=False)[0]["generated_text"]
        assert text == tokenizer.decode(ids[0])


def build_trainer(folder) -> Trainer:
    windows = draw_ids(8, 17)
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=12,
        save_steps=6,
        logging_steps=1,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        disable_tqdm=True,
        report_to="none",
        use_cpu=True,
    )
    examples = [{"input_ids": window, "labels": window} for window in windows]
    return Trainer(build_model(), arguments, train_dataset=examples, eval_dataset=examples)


def test_trainer_learns_evaluates_and_resumes_bit_for_bit(tmp_path):
    whole = build_trainer(tmp_path / "whole")
    loss_before = whole.evaluate()["eval_loss"]
    whole.train()
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert len(losses) == 12
    assert losses[-1] < losses[0] - 0.5
    assert whole.evaluate()["eval_loss"] < loss_before - 0.5
    # The cache is not a prediction, so only the logits are returned.
    assert whole.predict(whole.eval_dataset).predictions.shape == (8, 17, SHAPE["vocab_size"])

    shutil.copytree(tmp_path / "whole" / "checkpoint-6", tmp_path / "resumed" / "checkpoint-6")
    resumed = build_trainer(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 12
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name
