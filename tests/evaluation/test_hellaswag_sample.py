"""The packaged sample items: only the context reveals the right ending."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from conftest import REPOSITORY

from modeling_gpt2_repro.evaluation.hellaswag_data import SAMPLE_FILE, load_hellaswag
from modeling_gpt2_repro.evaluation.multiple_choice import pick_endings

ITEMS = load_hellaswag(SAMPLE_FILE)
CHANCE = len(ITEMS) / 4
TWO_STANDARD_ERRORS = 2 * math.sqrt(len(ITEMS) * 3 / 16)


@pytest.fixture(scope="module")
def measures(tokenizer):
    """Measures of an ending's length, by unit."""
    return {"tokens": lambda ending: len(tokenizer(" " + ending)["input_ids"]), "characters": len}


@pytest.mark.parametrize("unit, largest", [("tokens", 1), ("characters", 5)])
def test_the_endings_of_an_item_have_similar_lengths(measures, unit, largest):
    for item in ITEMS:
        lengths = [measures[unit](ending) for ending in item.endings]
        assert max(lengths) - min(lengths) <= largest, item.activity_label


@pytest.mark.parametrize("unit", ["tokens", "characters"])
def test_the_right_ending_is_equally_often_of_each_rank_in_length(measures, unit):
    counts = np.zeros(4)
    for item in ITEMS:
        lengths = [measures[unit](ending) for ending in item.endings]
        right = lengths[item.label]
        first, n_equal = sum(each < right for each in lengths), lengths.count(right)
        counts[first : first + n_equal] += 1 / n_equal  # ties share their ranks
    assert counts.tolist() == pytest.approx([CHANCE] * 4)


def test_an_ending_is_right_in_one_item_and_wrong_in_three():
    """Any model that scores endings without the context is right once in the four items that share them."""
    everywhere = Counter(ending for item in ITEMS for ending in item.endings)
    right = Counter(item.endings[item.label] for item in ITEMS)
    assert set(everywhere.values()) == {4} and set(right.values()) == {1} and everywhere.keys() == right.keys()
    assert len({(item.ctx_b, frozenset(item.endings)) for item in ITEMS}) == CHANCE
    assert all(set(item.endings).isdisjoint(following.endings) for item, following in itertools.pairwise(ITEMS))


def test_frequent_tokens_do_not_give_the_right_ending_away(tokenizer):
    text = "\n".join(path.read_text() for path in sorted(REPOSITORY.glob("docs/*.md")))
    counts = np.bincount(tokenizer(text)["input_ids"], minlength=len(tokenizer)) + 1
    nll = -np.log(counts / counts.sum())
    hits = np.zeros(2)
    for item in ITEMS:
        encoded = [tokenizer(" " + ending)["input_ids"] for ending in item.endings]
        picked = pick_endings([nll[ids].sum() for ids in encoded], [len(ids) for ids in encoded])
        hits += [each == item.label for each in picked]
    assert abs(hits - CHANCE).max() <= TWO_STANDARD_ERRORS


def test_labels_are_balanced_and_follow_no_pattern():
    labels = np.array([item.label for item in ITEMS])
    assert np.bincount(labels).tolist() == [CHANCE] * 4
    for period in range(1, 13):
        repeats = int((labels[period:] == labels[:-period]).sum())
        n = len(labels) - period
        assert abs(repeats - n / 4) <= 3 * math.sqrt(n * 3 / 16), period
