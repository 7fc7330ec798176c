"""The order of documents, as pure functions."""

import itertools

import numpy as np
import pytest

from modeling_gpt2_repro.data.prepare.shuffle import (
    choose_validation_end,
    count_duplicates,
    divide_key_space,
    hash_documents,
)


def hash_texts(texts, seed):
    encoded = [text.encode() for text in texts]
    offsets = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
    return hash_documents(offsets, np.frombuffer(b"".join(encoded), np.uint8), seed)


def test_key_depends_on_text_and_seed_only():
    keys = hash_texts(["a", "b", "a"], seed=1)
    assert keys[0] == keys[2] != keys[1]
    assert hash_texts(["b"], seed=1)[0] == keys[1]
    assert hash_texts(["b"], seed=2)[0] != keys[1]


def test_keys_are_spread_evenly():
    keys = hash_texts([str(i) for i in range(20_000)], seed=1337)
    counts = np.histogram(keys.astype(np.float64), bins=16, range=(0, 2.0**64))[0]
    assert abs(counts - 1250).max() < 6 * np.sqrt(1250)


@pytest.mark.parametrize("buckets", [1, 3, 1000])
def test_buckets_cover_the_key_space(buckets):
    ranges = divide_key_space(buckets)
    assert ranges[0][0] == 0
    assert ranges[-1][1] == 2**64 - 1
    assert all(last + 1 == low for (_, last), (low, _) in itertools.pairwise(ranges))


def test_counts_all_but_the_first_of_each():
    assert count_duplicates(np.array([1, 2, 2, 2, 5, 5])) == 3
    assert count_duplicates(np.array([], dtype=np.uint64)) == 0


@pytest.mark.parametrize(
    ("ends", "val_tokens", "expected"),
    [
        ([10, 20, 30, 100], 15, (2, 0)),  # the next boundary
        ([10, 20, 30, 100], 20, (2, 0)),  # exactly on a boundary
        ([100], 10, (0, 10)),  # one long document
        ([10, 100], 15, (1, 5)),  # the last document: no training tokens would be left
        ([90, 100], 10, (0, 10)),  # it would take most of the corpus
        ([90, 100], 60, (1, 0)),  # as requested
    ],
)
def test_validation_ends_at_a_boundary_if_there_is_one(ends, val_tokens, expected):
    assert choose_validation_end(np.array(ends), val_tokens, ends[-1] if ends[-1] == 100 else 100) == expected
