"""Scoring four endings on one reading of the context: the numbers of plain rows, or a fallback to plain rows."""

import random
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from tiny_models import build_model, build_stock_model, silence_blocks
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from modeling_gpt2_repro.evaluation import scoring
from modeling_gpt2_repro.evaluation.shared_context import EncodedChoices, build_rows

VOCAB_SIZE = 301


def draw_items(n=6, seed=0, vocab_size=VOCAB_SIZE):
    generator = random.Random(seed)

    def draw(length):
        return [generator.randrange(vocab_size) for _ in range(length)]

    return [
        EncodedChoices(draw(generator.randint(1, 20)), [draw(generator.randint(1, 12)) for _ in range(4)])
        for _ in range(n)
    ]


def build_llama():
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.3,
        )
    )


def build_granite():
    """Build a model that divides its head's logits by a constant."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return GraniteForCausalLM(
        GraniteConfig(vocab_size=VOCAB_SIZE, num_key_value_heads=4, initializer_range=0.3, logits_scaling=3.0, **sizes)
    )


def build_mamba():
    """Build a model with a state in place of attention, which ignores a 4-D mask."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "initializer_range": 0.3}
    return MambaForCausalLM(MambaConfig(vocab_size=VOCAB_SIZE, **sizes))


def build_bloom():
    """Build a model that derives its positions from the mask and takes no position ids."""
    sizes = {"hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3}
    return BloomForCausalLM(BloomConfig(vocab_size=VOCAB_SIZE, **sizes))


def build_mistral(window=24):
    """Build a model whose layers attend to a window, unless they are given a 4-D mask."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "initializer_range": 0.3, "sliding_window": window}
    return MistralForCausalLM(MistralConfig(vocab_size=VOCAB_SIZE, **sizes))


SHARING = {
    "ours": build_model,
    "ours, eager": lambda: build_model(attn_implementation="eager"),
    "gpt2": lambda: build_stock_model(initializer_range=0.3),
    "llama": build_llama,
    "granite": build_granite,
    "mistral, a window longer than all items": lambda: build_mistral(window=31),
}
NOT_SHARING = {"mamba": build_mamba, "bloom": build_bloom, "mistral": build_mistral}


def build(builders, name):
    torch.manual_seed(0)
    return builders[name]().eval()


def score_plainly(model, item):
    """Score each ending the obvious way: in its own row, with all logits."""
    sums = []
    for ids in item.ending_ids:
        logits = model(torch.tensor([item.context_ids + ids])).logits[0, -len(ids) - 1 : -1]
        sums.append(torch.nn.functional.cross_entropy(logits.float(), torch.tensor(ids), reduction="sum").item())
    return sums


@pytest.mark.parametrize("name", SHARING)
@torch.no_grad()
def test_shared_contexts_match_plain_rows(name):
    model, items = build(SHARING, name), draw_items()
    assert scoring.can_share_context(model, items, max_positions=None)
    rows = [build_rows(item, None, shares_context=True) for item in items]
    for sums, item in zip(scoring.score_items(model, rows), items, strict=True):
        assert sums == pytest.approx(score_plainly(model, item), abs=1e-3)


@pytest.mark.parametrize("name", NOT_SHARING)
@torch.no_grad()
def test_a_model_that_ignores_the_mask_is_detected(name):
    model, items = build(NOT_SHARING, name), draw_items()
    assert not scoring.can_share_context(model, items, max_positions=None)
    rows = [build_rows(item, None, shares_context=False) for item in items]
    for sums, item in zip(scoring.score_items(model, rows, selects_places=False), items, strict=True):
        assert sums == pytest.approx(score_plainly(model, item), abs=1e-3)


@torch.no_grad()
def test_a_window_missing_from_the_config_is_detected_on_the_longest_item():
    model, items = build(NOT_SHARING, "mistral"), draw_items(n=7)
    short = [item for item in items if item.n_read_of_longest <= 24]
    del model.config.sliding_window
    model.model.config = build_mistral().config
    assert len(short) > len(items) / 2 and scoring.can_share_context(model, short, max_positions=None)
    assert not scoring.can_share_context(model, items, max_positions=None)


@pytest.mark.parametrize("ignored", ["attention_mask", "position_ids"])
@torch.no_grad()
def test_ignoring_the_mask_or_the_positions_is_detected(ignored):
    class IgnoringModel(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = build(SHARING, "llama")
            self.config = self.model.config

        def get_output_embeddings(self):
            return self.model.get_output_embeddings()

        def forward(self, **inputs):
            return self.model(**{name: value for name, value in inputs.items() if name != ignored})

    assert not scoring.can_share_context(IgnoringModel(), draw_items(), max_positions=None)
    for dtype in (torch.bfloat16, torch.float16):
        assert not scoring.can_share_context(IgnoringModel().to(dtype), draw_items(), max_positions=None)


@pytest.mark.parametrize("name", ["ours", "gpt2", "llama"])
@torch.no_grad()
def test_low_precision_is_not_mistaken_for_ignoring_the_mask(name):
    for seed in range(4):
        items = draw_items(seed=seed)
        assert scoring.can_share_context(build(SHARING, name).bfloat16(), items, max_positions=None)
        with torch.autocast("cpu", torch.bfloat16):
            assert scoring.can_share_context(build(SHARING, name), items, max_positions=None)


@torch.no_grad()
def test_running_out_of_memory_is_not_mistaken_for_ignoring_the_mask(monkeypatch):
    model = build(SHARING, "ours")
    answers = iter([scoring.score_items(model, [build_rows(draw_items(1)[0], None, False)]), torch.OutOfMemoryError()])

    def score_items(*_, **__):
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(scoring, "score_items", score_items)
    with pytest.raises(torch.OutOfMemoryError):
        scoring.can_share_context(model, draw_items(1), max_positions=None)


@torch.no_grad()
def test_the_model_reads_each_context_once_and_the_head_only_targets():
    model, items = build(SHARING, "ours"), draw_items()
    seen = {}
    model.lm_head.register_forward_hook(lambda _, inputs, __: seen.update(head=inputs[0].shape[:-1].numel()))
    model.transformer.h[0].register_forward_hook(lambda _, inputs, __: seen.update(rows=len(inputs[0])))
    scoring.score_items(model, [build_rows(item, None, shares_context=True) for item in items])
    # The first tokens of an item's four endings are predicted from the same position.
    n_targets = sum(len(ids) for item in items for ids in item.ending_ids)
    assert seen == {"head": n_targets - 3 * len(items), "rows": len(items)}
    assert not model.lm_head._forward_pre_hooks


class FixedLogits(torch.nn.Module):
    """A model without an output head, whose logits come from a table by input token."""

    def __init__(self, table):
        super().__init__()
        self.table = torch.nn.Parameter(table)

    def get_output_embeddings(self):
        return None

    def forward(self, input_ids, use_cache):
        return SimpleNamespace(logits=self.table[input_ids])


@torch.no_grad()
def test_a_model_without_a_head_module_is_scored_by_its_logits():
    model, (item,) = FixedLogits(torch.randn(VOCAB_SIZE, VOCAB_SIZE)), draw_items(1)
    (sums,) = scoring.score_items(model, [build_rows(item, None, shares_context=False)])
    table = model.table.double().log_softmax(-1)
    tokens = [item.context_ids[-1:] + ids for ids in item.ending_ids]
    expected = [-sum(table[a, b].item() for a, b in pairwise(ids)) for ids in tokens]
    assert sums == pytest.approx(expected, abs=1e-4)


def test_the_budget_is_a_power_of_two_within_half_of_the_free_memory(monkeypatch):
    model = build(SHARING, "ours")
    bytes_per_token = 4 * (model.config.vocab_size + 32 * model.config.n_embd)

    def choose(free):
        monkeypatch.setattr(scoring, "measure_free_memory", lambda _: free)
        return scoring.choose_batch_tokens(model)

    assert choose(1000 * bytes_per_token) == 256
    assert choose(2**50) == scoring.LARGEST_BATCH_TOKENS["cpu"]
    assert choose(None) == scoring.LARGEST_BATCH_TOKENS["cpu"]
    assert choose(0) == 1


@pytest.mark.parametrize("selects_places", [True, False])
def test_autocast_does_not_change_the_sums(selects_places):
    model = build_model()
    silence_blocks(model)
    rows = [[item] for item in draw_items()]
    with scoring.evaluation_mode(model):
        exact = scoring.score_items(model, rows, selects_places)
        with torch.autocast("cpu", torch.bfloat16):
            sums = scoring.score_items(model, rows, selects_places)
            assert torch.is_autocast_enabled("cpu")
            assert model.lm_head(torch.zeros(1, 48)).dtype == torch.bfloat16  # the hooks are removed
    assert torch.allclose(torch.tensor(sums), torch.tensor(exact), atol=1e-3, rtol=0)
