"""Scores on HellaSwag, and their invariance to batch size, order and layout."""

import functools
import math
import random
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from modeling_gpt2_repro.core.errors import UserError
from modeling_gpt2_repro.evaluation import hellaswag
from modeling_gpt2_repro.evaluation.hellaswag import HellaSwagResult, evaluate_hellaswag, reduce_nll
from modeling_gpt2_repro.evaluation.hellaswag_data import N_ENDINGS, SAMPLE_FILE, load_hellaswag
from modeling_gpt2_repro.evaluation.hellaswag_protocols import EncodedHellaSwag, EncodedItem, encode_hellaswag
from modeling_gpt2_repro.evaluation.multiple_choice import CHANCE, format_score

REAL_FILE = Path(__file__).parents[3] / "shared" / "data" / "hellaswag_val.jsonl"


def build_model(n_positions=512):
    """Build a model with large random weights, whose answers depend on every token of the context."""
    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_head=2, n_embd=16, n_positions=n_positions, initializer_range=0.3)
    return GPT2LMHeadModel(config).eval()


@pytest.fixture(scope="module")
def model():
    return build_model()


@pytest.fixture(scope="module")
def sample():
    return load_hellaswag(SAMPLE_FILE)


def score_plainly(model, tokenizer, item):
    """Score an item in the original protocol the obvious way: one row at a time, no padding, no batches."""
    nll, mean_nll = [], []
    for ending in item.endings:
        context_ids, ending_ids = tokenizer(item.ctx)["input_ids"], tokenizer(" " + ending)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([context_ids + ending_ids]), logits_to_keep=len(ending_ids) + 1).logits[0, :-1]
        log_probabilities = logits.double().log_softmax(-1)
        nll.append(-sum(log_probabilities[i, token].item() for i, token in enumerate(ending_ids)))
        mean_nll.append(nll[-1] / len(ending_ids))
    return nll, nll.index(min(nll)), mean_nll.index(min(mean_nll))


def assert_matches_plain_scores(model, tokenizer, items):
    encoded = encode_hellaswag(items, tokenizer, "original")
    result = evaluate_hellaswag(model, encoded, batch_tokens=1024, show_progress=False)
    assert result.n == len(items)
    for item, scored in zip(items, result.scored_items, strict=True):
        nll, predicted, predicted_norm = score_plainly(model, tokenizer, item)
        assert scored.nll == pytest.approx(nll, abs=1e-3)
        assert (scored.ind, scored.predicted, scored.predicted_norm) == (item.ind, predicted, predicted_norm)
    assert 0 < result.acc < 1


def test_original_protocol_matches_one_row_at_a_time_on_the_sample(model, tokenizer, sample):
    assert_matches_plain_scores(model, tokenizer, sample[::6])


@pytest.mark.skipif(not REAL_FILE.exists(), reason="HellaSwag's validation items are not on this machine")
@pytest.mark.heavy
def test_original_protocol_matches_one_row_at_a_time_on_real_items(model, tokenizer):
    assert_matches_plain_scores(model, tokenizer, random.Random(1).sample(load_hellaswag(REAL_FILE), 40))


def test_batch_budget_and_order_do_not_change_the_numbers(model, tokenizer, sample):
    items = sample[::6]
    encoded = encode_hellaswag(items, tokenizer, "lm_eval")
    reference = evaluate_hellaswag(model, encoded, batch_tokens=1, show_progress=False)
    for order, batch_tokens in ((items, 3000), (items[::-1], 1000), (items[::-1], 10**6)):
        encoded = encode_hellaswag(order, tokenizer, "lm_eval")
        result = evaluate_hellaswag(model, encoded, batch_tokens=batch_tokens, show_progress=False)
        assert [scored.ind for scored in result.scored_items] == [item.ind for item in order]
        by_ind = {scored.ind: scored for scored in result.scored_items}
        for scored in reference.scored_items:
            assert by_ind[scored.ind].nll == pytest.approx(scored.nll, abs=1e-3)
            assert by_ind[scored.ind].predicted == scored.predicted


def test_a_long_context_is_truncated_on_the_left_and_counted(tokenizer, sample):
    model = build_model(n_positions=48)
    encoded = encode_hellaswag(sample[20:28], tokenizer, "original")
    result = evaluate_hellaswag(model, encoded, show_progress=False)
    n_long = 0
    for item, scored in zip(encoded.items, result.scored_items, strict=True):
        n_long += max(len(item.context_ids) + len(ids) for ids in item.ending_ids) > 49
        for ids, nll in zip(item.ending_ids, scored.nll, strict=True):
            tokens = torch.tensor([(item.context_ids + ids)[-49:]])
            with torch.no_grad():
                log_probabilities = model(tokens[:, :-1]).logits[0, -len(ids) :].log_softmax(-1)
            assert nll == pytest.approx(
                -log_probabilities.gather(1, torch.tensor(ids)[:, None]).sum().item(), abs=1e-3
            )
    assert 0 < n_long < len(encoded.items)
    assert result.n_truncated == n_long
    with pytest.raises(UserError, match="does not fit the model's 4 positions"):
        evaluate_hellaswag(build_model(n_positions=4), encoded, show_progress=False)


def test_the_model_and_the_random_state_are_unchanged(tokenizer, sample):
    model = build_model()
    encoded = encode_hellaswag(sample[:4], tokenizer, "original")
    expected = evaluate_hellaswag(model, encoded, show_progress=False)
    assert not model.training
    model.train()
    random_state = torch.get_rng_state()
    gradients_on = []
    model.register_forward_hook(lambda *_: gradients_on.append(torch.is_grad_enabled()))
    result = evaluate_hellaswag(model, encoded, show_progress=False)
    assert model.training
    assert torch.equal(torch.get_rng_state(), random_state)
    assert result.scored_items == expected.scored_items
    assert torch.is_grad_enabled()
    assert set(gradients_on) == {False}


class FixedLogits(torch.nn.Module):
    """A bfloat16 model whose logits come from a table by input token; any loss of precision is the scorer's."""

    def __init__(self, table):
        super().__init__()
        self.table = torch.nn.Parameter(table)
        self.config = GPT2Config()

    def get_output_embeddings(self):
        return None

    def forward(self, input_ids, use_cache):
        return SimpleNamespace(logits=self.table[input_ids])


def test_log_softmax_and_sums_are_in_float32():
    torch.manual_seed(0)
    table = torch.randn(50, 50).mul(3).bfloat16()
    item = EncodedItem([1, 2], [[3, 4, 5] * 20, [6], [7, 8], [9]], ind=0, label=0, ending_lengths=(60, 1, 2, 1))
    result = evaluate_hellaswag(FixedLogits(table), EncodedHellaSwag("original", (item,)), show_progress=False)
    log_probabilities = table.double().log_softmax(-1)
    tokens = [2, *item.ending_ids[0]]
    expected = -sum(log_probabilities[a, b].item() for a, b in pairwise(tokens))
    assert expected > 100
    assert result.scored_items[0].nll[0] == pytest.approx(expected, abs=1e-3)


def test_the_fallback_to_plain_rows_is_reported_once(tokenizer, sample, capsys):
    class GPT2WithoutMask(GPT2LMHeadModel):
        def forward(self, input_ids, use_cache):
            return super().forward(input_ids, use_cache=use_cache)

    stock = build_model()
    model = GPT2WithoutMask(stock.config).eval()
    model.load_state_dict(stock.state_dict())
    encoded = encode_hellaswag(sample[:4], tokenizer, "lm_eval")
    expected = evaluate_hellaswag(stock, encoded, show_progress=False)
    assert capsys.readouterr().err == ""
    for _ in range(2):
        result = evaluate_hellaswag(model, encoded, show_progress=False)
        for one, other in zip(result.scored_items, expected.scored_items, strict=True):
            assert one.nll == pytest.approx(other.nll, abs=1e-3)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("GPT2WithoutMask does not support a 4-D attention mask")


def test_progress_shows_the_protocol_and_the_running_score(model, tokenizer, sample, capsys, monkeypatch):
    encoded = encode_hellaswag(sample[:4], tokenizer, "lm_eval")
    evaluate_hellaswag(model, encoded, batch_tokens=1)
    assert capsys.readouterr().err == ""  # not a terminal
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    # Refresh after every batch, however fast.
    monkeypatch.setattr(hellaswag, "tqdm", functools.partial(hellaswag.tqdm, mininterval=0, miniters=1))
    evaluate_hellaswag(model, encoded, batch_tokens=1)
    bar = capsys.readouterr().err
    assert "HellaSwag lm_eval" in bar and "4/4" in bar and "acc_norm 0." in bar
    assert not bar.rsplit("\r", 2)[1].strip()  # the finished bar clears its line


def test_non_finite_scores_are_rejected(tokenizer, sample):
    model = build_model()
    torch.nn.init.constant_(model.transformer.ln_f.weight, math.nan)
    with pytest.raises(UserError, match="non-finite log-probability for item 0"):
        evaluate_hellaswag(model, encode_hellaswag(sample[:2], tokenizer, "original"), show_progress=False)


def make_encoded(labels, lengths):
    items = [EncodedItem([1], [[2]] * 4, ind=i, label=label, ending_lengths=lengths) for i, label in enumerate(labels)]
    return EncodedHellaSwag("lm_eval", tuple(items))


def test_reduction_picks_by_sum_and_by_mean():
    # By sum, ending 0 wins with 6; by mean, ending 3 wins with 8 / 8.
    encoded = make_encoded(labels=[0, 3, 3, 3, 1], lengths=(2, 3, 4, 8))
    result = reduce_nll(encoded, [[6.0, 7.0, 9.0, 8.0]] * 5)
    assert {(item.predicted, item.predicted_norm) for item in result.scored_items} == {(0, 3)}
    assert (result.n, result.acc, result.acc_norm) == (5, 0.2, 0.6)
    # The sample standard deviations of [1, 0, 0, 0, 0] and [0, 1, 1, 1, 0], divided by the square root of 5.
    assert result.acc_stderr == pytest.approx(0.2)
    assert result.acc_norm_stderr == pytest.approx(math.sqrt(0.3 / 5))


def test_reduction_of_edge_cases():
    tie = reduce_nll(make_encoded([1], (2, 2, 0, 2)), [[5.0, 4.0, 6.0, 4.0]])
    assert (tie.scored_items[0].predicted, tie.scored_items[0].predicted_norm) == (1, 1)
    assert (tie.acc, tie.acc_stderr) == (1.0, None)


def test_scores_are_shown_with_their_standard_errors_beside_chance():
    result = HellaSwagResult("lm_eval", 1_042, 0.25, 0.0625, 0.5, 0.125, scored_items=())
    assert result.describe() == [
        "hellaswag_lm_eval/acc_norm 0.5000 ± 0.1250 (chance 0.25, 1,042 items)",
        "hellaswag_lm_eval/acc 0.2500 ± 0.0625 (chance 0.25, 1,042 items)",
    ]
    assert CHANCE == 1 / N_ENDINGS
    assert format_score(0.25) == "0.2500 (chance 0.25)"
