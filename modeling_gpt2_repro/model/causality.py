"""Check that a model is causal, i.e. predicts each token from earlier tokens only."""

from typing import Any

import torch
from transformers import PreTrainedModel

from ..core.errors import UserError
from .limits import count_embeddings, get_max_positions

PROBE_TOKENS = 8
# Largest gradient allowed at later tokens, relative to the largest gradient. Over all architectures in transformers,
# with random weights, causal models give 0 and the others at least 0.001.
LARGEST_FUTURE_GRADIENT = 1e-5
# Largest change that later tokens may cause in a logit, relative to the largest logit: 13 rounding steps of bfloat16.
LARGEST_LOGIT_CHANGE = 0.05


def check_causal(model: PreTrainedModel, name: str, flag: str = "--model") -> None:
    """Check that a model is causal, on its device and in the precision of the caller.

    Args:
        name, flag: the model as the user passed it, and the flag, for error messages.

    Raises:
        UserError: the model attends to later tokens (as BERT does), or its forward pass fails.
    """
    try:
        is_causal = not looks_ahead(model)
    except RuntimeError as error:  # e.g. XLNet in bfloat16
        raise UserError(f"{flag} {name} loads, but its forward pass fails: {error}") from error
    if not is_causal:
        raise UserError(
            f"{flag} {name} is not causal: {type(model).__name__} attends to the token it predicts and to later ones, "
            "so its outputs are not the probability of a text; pass a model trained for next-token prediction"
        )


def looks_ahead(model: PreTrainedModel) -> bool:
    """Return whether early logits depend on later tokens, measured by their gradient at the later embeddings.

    With a causal mask this gradient is exactly 0 in any precision. The fallback, for models without a backward pass
    (such as some quantized kernels), compares the logits of two texts with a common prefix. It is less sensitive: in
    mixture-of-experts models the order of summation depends on all tokens, which in bfloat16 changes logits as much as
    an untrained BERT's attention to later tokens.
    """
    n_rows, n_positions = count_embeddings(model), get_max_positions(model)
    length = min(PROBE_TOKENS, max(1, (n_positions or PROBE_TOKENS * 2) // 2))  # RoBERTa has two fewer positions
    half = length // 2
    # Spread over the vocabulary, except its ends, which often are padding and other special tokens.
    ids = (2 * torch.arange(length, device=model.device)[None] + 1) * n_rows // (2 * length)
    try:
        gradient = _differentiate_first_half(model, ids)
    except (RuntimeError, IndexError):  # no backward pass, or an embedding module that is never called
        other = torch.cat([ids[:, :half], ids[:, half:].flip(1)], dim=1)
        with torch.no_grad():
            one, two = (model(input_ids=each, use_cache=False).logits[:, :half].float() for each in (ids, other))
        return bool(((one - two).abs() > LARGEST_LOGIT_CHANGE * one.abs().max()).any())
    return bool((gradient[half:].abs() > LARGEST_FUTURE_GRADIENT * gradient.abs().max()).any())


def _differentiate_first_half(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Return the gradient of a loss on the first half of `ids` (1, length) at the embeddings, as (length, width)."""
    embeddings: list[torch.Tensor] = []

    def make_leaf(_: torch.nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
        embeddings.append(output.detach().requires_grad_())
        return embeddings[-1].clone()  # the model may change it in place

    with torch.enable_grad(), model.get_input_embeddings().register_forward_hook(make_leaf):
        logits = model(input_ids=ids, use_cache=False).logits[:, : ids.shape[1] // 2]
        (gradient,) = torch.autograd.grad(logits.float().log_softmax(-1)[..., 0].sum(), embeddings[0])
    return gradient.reshape(ids.shape[1], -1)  # XLNet puts the length first
