"""Limits of a model: its token ids and positions."""

from typing import Any

from transformers import PreTrainedModel

from ..core.errors import UserError


def get_max_positions(model: PreTrainedModel) -> int | None:
    """Return the maximum sequence length of a model, or `None` if its configuration sets no limit."""
    n_positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return None if n_positions == -1 else n_positions  # XLNet's value for no limit


def count_embeddings(model: PreTrainedModel) -> int:
    """Return the number of token ids that a model has embeddings for."""
    embeddings: Any = model.get_input_embeddings()  # an `nn.Embedding`, or a stand-in for one
    return embeddings.num_embeddings


def check_sequence_length(model: PreTrainedModel, sequence_length: int, name: str) -> None:
    """Check that `sequence_length` does not exceed the positions of the model, called `name` in the error.

    Raises:
        UserError: it does.
    """
    n_positions = get_max_positions(model)
    if n_positions is not None and sequence_length > n_positions:
        raise UserError(f"--sequence_length {sequence_length} is longer than the {n_positions} positions of {name}")


def check_token_ids(model: PreTrainedModel, largest_id: int, name: str, flag: str = "--model") -> None:
    """Check that a model has an embedding for every token id up to `largest_id`.

    Pass the largest id in the text, not in the vocabulary: some tokenizers have more ids than their model has
    embeddings, but no text encodes to the extra ones.

    Args:
        name, flag: the model as the user passed it, and the flag, for error messages.

    Raises:
        UserError: an id has no embedding.
    """
    n_rows = count_embeddings(model)
    if largest_id >= n_rows:
        raise UserError(
            f"{flag} {name} has embeddings for {n_rows} token ids, but its tokenizer produces id {largest_id}: "
            "replace the tokenizer in its folder with the one that it was trained with"
        )
