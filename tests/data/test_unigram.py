"""The loss of a unigram model."""

import math

import numpy as np
import pytest

from modeling_gpt2_repro.core.errors import UserError
from modeling_gpt2_repro.data.unigram import compute_unigram_loss, count_tokens, measure_unigram_loss


def test_the_loss_is_the_cross_entropy_under_smoothed_frequencies():
    counts = np.array([3, 0, 1])  # smoothed: 4/7, 1/7, 2/7
    loss = compute_unigram_loss(counts, np.array([0, 0, 1, 2], np.uint16))
    assert loss == pytest.approx(-(2 * math.log(4 / 7) + math.log(1 / 7) + math.log(2 / 7)) / 4)
    # Without training tokens every id is equally likely.
    assert compute_unigram_loss(np.zeros(50, int), np.arange(10)) == pytest.approx(math.log(50))


def test_tokens_are_counted_across_chunks(monkeypatch):
    monkeypatch.setattr("modeling_gpt2_repro.data.shards.TOKENS_PER_CHUNK", 2)
    assert count_tokens(np.array([1, 2, 1, 3, 1], np.uint16), 5).tolist() == [0, 3, 1, 1, 0]
    with pytest.raises(UserError, match="4, at position"):
        count_tokens(np.array([1, 2, 1, 3, 4], np.uint16), 4)


def test_validation_targets_are_predicted_from_the_first_training_shard(tmp_path):
    np.save(tmp_path / "a_val_000000.npy", np.array([9, 1, 1, 2, 3, 3, 3], np.uint16))
    np.save(tmp_path / "a_train_000001.npy", np.array([1, 1, 1, 2, 2, 3], np.uint16))
    np.save(tmp_path / "a_train_000002.npy", np.array([3] * 90, np.uint16))
    # Two windows of two tokens: the targets are 1, 1, 2 and 3.
    expected = -(2 * math.log(4 / 16) + math.log(3 / 16) + math.log(2 / 16)) / 4
    assert measure_unigram_loss(str(tmp_path), 2, 2, vocab_size=10) == pytest.approx(expected)
    with pytest.raises(UserError, match="beyond the vocabulary"):
        measure_unigram_loss(str(tmp_path), 2, 2, vocab_size=3)
    with pytest.raises(UserError, match="no data folder"):
        measure_unigram_loss(str(tmp_path / "none"), 2, 2, vocab_size=10)
