"""The order of training."""

import numpy as np
import pytest

from modeling_gpt2_repro.data.order import WindowOrder, divide_windows, permute


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 16, 17, 255, 256, 257, 1000, 65537])
@pytest.mark.parametrize("epoch", [0, 1])
def test_permutation_is_a_bijection(size, epoch):
    assert np.array_equal(np.sort(permute(np.arange(size), size, seed=3, epoch=epoch)), np.arange(size))


def test_permutation_of_a_huge_range_stays_in_it_without_collisions():
    size = 10**12
    indices = np.random.default_rng(0).integers(0, size, 100_000)
    permuted = permute(indices, size, seed=3, epoch=0)
    assert permuted.min() >= 0 and permuted.max() < size
    assert len(np.unique(permuted)) == len(np.unique(indices))


def test_permutation_mixes_and_depends_on_seed_and_epoch():
    indices = np.arange(10_000)
    first = permute(indices, 10_000, seed=3, epoch=0)
    assert abs(np.corrcoef(indices, first)[0, 1]) < 0.05
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.05
    for other in (permute(indices, 10_000, seed=4, epoch=0), permute(indices, 10_000, seed=3, epoch=1)):
        assert np.mean(other == first) < 0.01


def test_a_single_index_can_be_permuted():
    whole = permute(np.arange(1000), 1000, seed=1, epoch=2)
    assert np.array_equal(permute(np.array([7, 991]), 1000, seed=1, epoch=2), whole[[7, 991]])


@pytest.mark.parametrize("n_windows, windows_per_step", [(24, 8), (23, 8), (100, 7), (5, 12)])
def test_every_epoch_sees_every_window_once(n_windows, windows_per_step):
    order = WindowOrder(n_windows, seed=1)
    steps = [order.windows_of_step(step, windows_per_step) for step in range(-(-3 * n_windows // windows_per_step))]
    windows = np.concatenate(steps)[: 3 * n_windows].reshape(3, n_windows)
    for epoch in windows:
        assert np.array_equal(np.sort(epoch), np.arange(n_windows))
    assert not np.array_equal(windows[0], windows[1])


def test_first_permuted_epoch():
    read_in_order = np.arange(6)
    assert np.array_equal(WindowOrder(6, seed=1, first_permuted_epoch=1).windows_of_step(0, 6), read_in_order)
    assert not np.array_equal(WindowOrder(6, seed=1, first_permuted_epoch=1).windows_of_step(1, 6), read_in_order)
    assert not np.array_equal(WindowOrder(6, seed=1, first_permuted_epoch=0).windows_of_step(0, 6), read_in_order)
    assert np.array_equal(WindowOrder(6, seed=1, first_permuted_epoch=None).windows_of_step(5, 6), read_in_order)


@pytest.mark.parametrize("n_ranks, micro_batch_size", [(1, 1), (1, 24), (2, 4), (3, 8), (24, 1), (6, 2)])
def test_ranks_and_micro_steps_only_divide_the_step(n_ranks, micro_batch_size):
    windows = np.random.default_rng(0).permutation(24)
    shares = [divide_windows(windows, n_ranks, rank, micro_batch_size) for rank in range(n_ranks)]
    assert {share.shape for share in shares} == {(24 // (n_ranks * micro_batch_size), micro_batch_size)}
    assert np.array_equal(np.sort(np.concatenate(shares, axis=None)), np.arange(24))
