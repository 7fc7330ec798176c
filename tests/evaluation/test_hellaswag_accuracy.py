"""The metric as a module of `evaluate`, loaded from its path without a network."""

import math
from pathlib import Path

import evaluate
import pytest

from modeling_gpt2_repro.evaluation import hellaswag, multiple_choice
from modeling_gpt2_repro.evaluation.hellaswag import reduce_nll
from modeling_gpt2_repro.evaluation.hellaswag_protocols import EncodedHellaSwag, EncodedItem

MODULE = Path(hellaswag.__file__).with_name("hellaswag_accuracy")
# By sum, ending 0 wins with 6; by mean, ending 3 wins with 8 / 8.
NLL, LENGTHS, LABELS = [[6.0, 7.0, 9.0, 8.0]] * 5, [[2, 3, 4, 8]] * 5, [0, 3, 3, 3, 1]


@pytest.fixture
def metric(tmp_path, monkeypatch):
    monkeypatch.setattr("evaluate.config.HF_MODULES_CACHE", str(tmp_path / "modules"))
    return evaluate.load(str(MODULE), cache_dir=str(tmp_path / "cache"))


def test_accuracies_follow_from_sums_and_lengths(metric):
    scores = metric.compute(predictions=NLL, lengths=LENGTHS, references=LABELS)
    # The sample standard deviations of [1, 0, 0, 0, 0] and [0, 1, 1, 1, 0], divided by the square root of 5.
    assert scores == {
        "acc": 0.2,
        "acc_stderr": pytest.approx(0.2),
        "acc_norm": 0.6,
        "acc_norm_stderr": pytest.approx(math.sqrt(0.3 / 5)),
    }


def test_it_matches_the_scores_that_the_scripts_report(metric):
    items = [EncodedItem([1], [[2]] * 4, i, label, tuple(LENGTHS[i])) for i, label in enumerate(LABELS)]
    result = reduce_nll(EncodedHellaSwag("lm_eval", tuple(items)), NLL)
    for nll, lengths, label in zip(NLL, LENGTHS, LABELS, strict=True):
        metric.add_batch(predictions=[nll], lengths=[lengths], references=[label])
    assert metric.compute() == {
        name: getattr(result, name) for name in ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr")
    }


def test_the_first_of_equal_endings_wins_and_an_empty_ending_never_does():
    assert multiple_choice.pick_endings([5.0, 4.0, 6.0, 4.0], [2, 2, 0, 2]) == (1, 1)
    assert multiple_choice.compute_accuracies([(1, 1)], [1])["acc_stderr"] is None
