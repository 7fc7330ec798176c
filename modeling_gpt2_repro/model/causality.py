"""Causality: does a model predict each token from the tokens before it alone?"""

import torch
from transformers import PreTrainedModel

from ..core.errors import UserError
from .limits import get_max_positions

PROBE_TOKENS = 8
# The gradient that later tokens may get, as a share of the largest one: of all architectures in transformers, causal
# ones give 0 and the others at least 0.001, with random weights.
LARGEST_FUTURE_GRADIENT = 1e-5
# The change of a logit that later tokens may cause, as a share of the largest logit: 13 rounding steps of bfloat16.
LARGEST_LOGIT_CHANGE = 0.05


def check_causal(model: PreTrainedModel, name: str, flag: str = "--model") -> None:
    """Check that a model is causal. Call it on the device and in the precision of the evaluation.

    Args:
        name, flag: what the user gave as the model, and by which flag, for error messages.

    Raises:
        UserError: the model attends to later tokens, as BERT does, or its forward pass fails.
    """
    try:
        is_causal = not reads_ahead(model)
    except RuntimeError as error:  # such as XLNet in bfloat16
        raise UserError(f"{flag} {name} loads, but does not run: {error}") from error
    if not is_causal:
        raise UserError(
            f"{flag} {name} is not causal: {type(model).__name__} predicts a token from that token and later ones, so "
            "its numbers are not the probability of a text; give a model trained to predict the next token"
        )


def reads_ahead(model: PreTrainedModel) -> bool:
    """Return whether early logits depend on late tokens, by the gradient of the former to the latter's embeddings.

    Behind a causal mask this gradient is exactly 0 in any precision. Comparing the logits of two texts with a common
    beginning is less sharp: where experts gather tokens, the order of sums depends on all of them, which in bfloat16
    changes logits as much as an untrained BERT's attention to the future does. It is the fallback for models without a
    backward pass, such as some kernels for quantized weights.
    """
    n_rows, n_positions = model.get_input_embeddings().num_embeddings, get_max_positions(model)
    length = min(PROBE_TOKENS, max(1, (n_positions or PROBE_TOKENS * 2) // 2))  # RoBERTa has two positions less
    half = length // 2
    # Spread over the vocabulary without its ends, where padding and other special tokens are.
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
    """Return the gradient of a loss on the first half of `ids`, (1, length), to the embeddings: (length, width)."""
    embeddings = []

    def make_leaf(_: torch.nn.Module, __: tuple, output: torch.Tensor) -> torch.Tensor:
        embeddings.append(output.detach().requires_grad_())
        return embeddings[-1].clone()  # the model may change it in place

    with torch.enable_grad(), model.get_input_embeddings().register_forward_hook(make_leaf):
        logits = model(input_ids=ids, use_cache=False).logits[:, : ids.shape[1] // 2]
        (gradient,) = torch.autograd.grad(logits.float().log_softmax(-1)[..., 0].sum(), embeddings[0])
    return gradient.reshape(ids.shape[1], -1)  # XLNet's has the length first
