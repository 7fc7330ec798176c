"""LoRA with `peft`, which wraps modules in place; the loss must be computed by the wrapped modules."""

import pytest
import torch
from tiny_models import SHAPE, assert_close, build_model, build_pair, draw_ids
from torch.nn.functional import cross_entropy

peft = pytest.importorskip("peft", reason="peft is not installed")

# Name -> the adapted modules, whether they are Conv1D (weights stored as in x out), and whether the head is tied.
# An adapter on one use of a tied weight cannot be merged into it, here as in transformers' own GPT-2.
TARGETS = {
    "projections": (["c_attn", "c_proj", "c_fc"], True, True),
    "head": (["lm_head"], False, False),
    "head of a tied model": (["lm_head"], False, True),
    "embedding of a tied model": (["wte"], False, True),
}


def build_base(tied: bool):
    return build_pair(tie_word_embeddings=tied)


def adapt(model, target_modules, is_conv1d, **options) -> peft.PeftModel:
    torch.manual_seed(3)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=target_modules,
        fan_in_fan_out=is_conv1d,
        init_lora_weights=False,  # random factors, as after some training; none is zero
        task_type="CAUSAL_LM",
        **options,
    )
    return peft.get_peft_model(model, config).eval()


def split_inputs(ids: torch.Tensor, targets: str) -> dict[str, torch.Tensor]:
    if targets == "labels":
        return {"input_ids": ids, "labels": ids}
    return {"input_ids": ids[:, :-1], "shift_labels": ids[:, 1:].contiguous()}


def compute_loss_from_logits(model, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return cross_entropy(model(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings:UserWarning")
@pytest.mark.parametrize("targets", ["labels", "shift_labels"])
@pytest.mark.parametrize("adapted", TARGETS)
def test_training_step_goes_through_the_adapters(adapted, targets):
    target_modules, is_conv1d, tied = TARGETS[adapted]
    model, stock = (adapt(base, target_modules, is_conv1d) for base in build_base(tied))
    ids = draw_ids()
    expected = compute_loss_from_logits(stock, ids)
    assert (expected - compute_loss_from_logits(build_model(tie_word_embeddings=tied), ids)).abs() > 0.01
    loss = model.train()(**split_inputs(ids, targets)).loss
    assert_close(loss, expected)

    loss.backward()
    stock.train()(input_ids=ids, labels=ids).loss.backward()
    for (name, ours), (_, theirs) in zip(model.named_parameters(), stock.named_parameters(), strict=True):
        assert ours.requires_grad == ("lora_" in name), name
        if ours.requires_grad:
            assert ours.grad.abs().max() > 0, name
            assert_close(ours.grad, theirs.grad)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@pytest.mark.parametrize("adapted", ["projections", "head"])
def test_adapters_save_load_and_merge(adapted, tmp_path):
    target_modules, is_conv1d, tied = TARGETS[adapted]
    base, ids = build_base(tied), draw_ids()
    model = adapt(base[0], target_modules, is_conv1d)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        model.save_pretrained(tmp_path / "adapter")
        for fresh in build_base(tied):  # trained on our model, it works on stock GPT-2 too
            loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter")
            assert_close(loaded(input_ids=ids).logits, expected)

        merged = model.merge_and_unload()
        assert type(merged) is type(base[0])
        assert_close(merged(ids).logits, expected)
        merged.save_pretrained(tmp_path / "merged")
        assert_close(type(merged).from_pretrained(tmp_path / "merged")(ids).logits, expected)
    loss = merged.train()(**split_inputs(ids, "shift_labels")).loss
    assert_close(loss, cross_entropy(expected[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))


@pytest.mark.parametrize("targets", ["labels", "shift_labels"])
def test_a_fully_trained_head_computes_the_loss(targets):
    model, ids = adapt(build_base(tied=False)[0], ["c_attn"], True, modules_to_save=["lm_head"]), draw_ids()
    head = model.base_model.model.lm_head.modules_to_save["default"]
    with torch.no_grad():
        head.weight.mul_(5.0)
    loss = model.train()(**split_inputs(ids, targets)).loss
    assert_close(loss, compute_loss_from_logits(model.eval(), ids))
    loss.backward()
    assert head.weight.grad.abs().max() > 0


def test_hooks_on_the_head_run_in_training():
    """Offloading, pruning and ZeRO 3 prepare a module's weights in hooks, which reading the weight would bypass."""
    model, ids = build_model(), draw_ids()
    model.lm_head.register_forward_pre_hook(lambda _, arguments: (2.0 * arguments[0],))
    expected = compute_loss_from_logits(model, ids)
    assert_close(model.train()(**split_inputs(ids, "shift_labels")).loss, expected)


def test_a_head_with_a_bias_keeps_it_in_training():
    model, ids = build_model(), draw_ids()
    model.lm_head.bias = torch.nn.Parameter(torch.randn(SHAPE["vocab_size"]))
    expected = compute_loss_from_logits(model, ids)
    assert_close(model.train()(**split_inputs(ids, "shift_labels")).loss, expected)
