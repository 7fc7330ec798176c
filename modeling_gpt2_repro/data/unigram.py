"""The unigram baseline: the loss of predicting each token from its frequency alone, ignoring the context."""

import numpy as np

from ..core.errors import UserError
from .dataset import TokenDataset
from .shards import describe_ids_beyond, iterate_chunks, read_tokens


def compute_unigram_loss(counts: np.ndarray, tokens: np.ndarray) -> float:
    """Return the cross-entropy of tokens, in nats per token, under frequencies with add-one smoothing.

    Args:
        counts: how often each id occurs in the training tokens, of shape (vocab_size,).
        tokens: ids to predict, all below vocab_size.
    """
    log_probabilities = np.log(counts + 1) - np.log(counts.sum() + len(counts))
    return -float(log_probabilities[tokens].mean())


def count_tokens(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """Count each id in a shard, as int64 of shape (vocab_size,).

    Raises:
        UserError: an id is not below `vocab_size`.
    """
    counts = np.zeros(vocab_size, np.int64)
    for _, chunk in iterate_chunks(tokens):
        if (chunk >= vocab_size).any():
            raise UserError(f"the data {describe_ids_beyond(tokens, vocab_size)}")
        counts += np.bincount(chunk, minlength=vocab_size)
    return counts


def measure_unigram_loss(folder: str, n_windows: int, sequence_length: int, vocab_size: int) -> float:
    """Return the unigram loss on the targets of the first `n_windows` validation windows, in nats per token.

    The frequencies are those of the first training shard: documents are shuffled globally, and 100 M tokens suffice.

    Raises:
        UserError: the folder's shards cannot be read.
    """
    train_set, val_set = (TokenDataset(folder, split, sequence_length, vocab_size) for split in ("train", "val"))
    end = min(n_windows, len(val_set)) * sequence_length + 1
    targets = read_tokens(val_set.shards, 1, end)
    count_tokens(targets, vocab_size)  # raises for ids beyond the vocabulary
    return compute_unigram_loss(count_tokens(train_set.shards[0], vocab_size), targets)
