"""Scoring: log-probabilities of given endings after a context, under any causal language model."""

import contextlib
import math
from collections.abc import Generator, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from ..core.devices import is_out_of_memory, measure_free_memory
from .shared_context import Batch, EncodedChoices, build_rows, collate_rows, fits_in_one_row

# Larger batches only cost memory: on a CPU, the throughput of GPT-2 124M is flat from 512 to 1,024 tokens and then
# declines slowly. The value for other devices is a guess.
LARGEST_BATCH_TOKENS = {"cpu": 1024}
OTHER_LARGEST_BATCH_TOKENS = 32_768
# Places whose logits are converted to float32 and exponentiated at once.
SOFTMAX_CHUNK_PLACES = 512


@contextlib.contextmanager
def evaluation_mode(model: torch.nn.Module) -> Generator[None]:
    """Disable dropout and gradients within the context, then restore the training mode."""
    was_training = model.training
    model.eval()
    try:
        # Not `inference_mode`: a model may cache tensors on its first call (rotary tables) that training needs later.
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def choose_batch_tokens(model: PreTrainedModel) -> int:
    """Return the maximum tokens per batch: as many as fit in half of the device's free memory, up to a limit.

    The result is a power of two, so that small changes in free memory rarely change the batches and hence the last
    bits of the scores.
    """
    device = next(model.parameters()).device
    free = measure_free_memory(device)
    if free is None:
        return LARGEST_BATCH_TOKENS["cpu"]
    config = model.config.get_text_config()
    # Per token: the logits, and one layer's hidden, inner and attention states, in at most float32.
    bytes_per_token = 4 * (config.vocab_size + 32 * config.hidden_size)
    fitting = max(1, free // 2 // bytes_per_token)
    most = LARGEST_BATCH_TOKENS.get(device.type, OTHER_LARGEST_BATCH_TOKENS)
    return min(most, 1 << (fitting.bit_length() - 1))


def score_items(
    model: PreTrainedModel, rows_by_item: Sequence[Sequence[EncodedChoices]], selects_places: bool = True
) -> list[list[float]]:
    """Return the summed negative log-probability, in nats, of each ending of each item, in one forward pass.

    Args:
        selects_places: apply the vocabulary head only at the places from which an ending's token is predicted.
    """
    batch = collate_rows([row for rows in rows_by_item for row in rows])
    device = next(model.parameters()).device
    inputs: dict[str, Any] = {"input_ids": batch.input_ids.to(device), "use_cache": False}
    if not batch.is_plain:  # in plain rows, causal attention alone hides the padding
        inputs["position_ids"] = batch.position_ids.to(device)
        inputs["attention_mask"] = batch.build_attention_mask(get_compute_dtype(model), device)
    sums = iter(sum_nll(compute_logits(model, inputs, batch.places, selects_places), batch))
    return [[next(sums) for row in rows for _ in row.ending_ids] for rows in rows_by_item]


def compute_logits(
    model: PreTrainedModel, inputs: dict[str, Any], places: tuple[torch.Tensor, torch.Tensor], selects_places: bool
) -> torch.Tensor:
    """Return the model's logits at `places`, given as (rows, columns), with shape (places, vocab_size).

    The vocabulary head dominates a small model's time and memory, so a pre-hook passes it only the hidden states at
    `places`. The model itself still processes the head's output, because some models scale or cap it.
    """
    is_selected = False

    def select(_: torch.nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        nonlocal is_selected
        is_selected = True
        hidden_states, *others = arguments
        return hidden_states[places].unsqueeze(0), *others

    head = model.get_output_embeddings() if selects_places else None
    with (
        head.register_forward_pre_hook(select) if head is not None else contextlib.nullcontext(),
        head_without_autocast(model),
    ):
        logits = model(**inputs).logits
    return logits[0] if is_selected else logits[places]


@contextlib.contextmanager
def head_without_autocast(model: torch.nn.Module) -> Generator[None]:
    """Run a model's vocabulary head in its weight's dtype while autocast applies to the rest.

    In bfloat16, logits near -100, which OpenAI's GPT-2 produces, are spaced half a nat apart.
    """
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    weight = getattr(head, "weight", None)
    if head is None or weight is None or not torch.is_autocast_enabled(weight.device.type):
        yield
        return
    autocast = torch.autocast(weight.device.type, enabled=False)

    def enter(_: torch.nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        autocast.__enter__()
        hidden_states, *others = arguments
        return hidden_states.to(weight.dtype), *others

    def leave(*_: Any) -> None:
        autocast.__exit__(None, None, None)

    with head.register_forward_pre_hook(enter), head.register_forward_hook(leave, always_call=True):
        yield


def sum_nll(logits: torch.Tensor, batch: Batch) -> list[float]:
    """Return the summed negative log-probability of each ending from a batch's logits (places, vocab_size).

    Computed in float32, because bfloat16 rounds a log-probability near 10 by up to 0.03 nats per token.
    """
    target_places, target_ids = batch.target_places.to(logits.device), batch.target_ids.to(logits.device)
    normalizers = torch.cat([chunk.float().logsumexp(dim=-1) for chunk in logits.split(SOFTMAX_CHUNK_PLACES)])
    nll = normalizers[target_places] - logits[target_places, target_ids].float()
    return [part.sum().item() for part in nll.cpu().double().split(batch.ending_lengths)]


def get_compute_dtype(model: torch.nn.Module) -> torch.dtype:
    """Return the dtype of the model's matrix products: autocast's if enabled, otherwise that of its parameters."""
    parameter = next(model.parameters())
    device_type = parameter.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else parameter.dtype


def can_share_context(model: PreTrainedModel, items: Sequence[EncodedChoices], max_positions: int | None) -> bool:
    """Return whether a context can be read once for all its endings, determined by scoring two items both ways.

    Some architectures silently ignore the mask or the positions, others reject them. The two items have the median and
    the maximum length among those that fit in one row; if none fits, the result does not matter. The mask replaces a
    layer's attention window, so all items must fit in that window. Call it in `evaluation_mode`.
    """
    config, longest = model.config.get_text_config(), max(item.n_read_of_longest for item in items)
    windows = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size", "window_size"))
    if any(isinstance(window, int) and window < longest for window in windows):
        return False
    fitting = sorted((item for item in items if fits_in_one_row(item, max_positions)), key=lambda item: item.n_read)
    probes = {len(fitting) // 2, len(fitting) - 1} if fitting else ()
    return all(_gives_same_scores(model, fitting[index], max_positions) for index in probes)


def _gives_same_scores(model: PreTrainedModel, item: EncodedChoices, max_positions: int | None) -> bool:
    separate, shared = (build_rows(item, max_positions, shares_context) for shares_context in (False, True))
    (expected,) = score_items(model, [separate], selects_places=False)
    try:
        (nll,) = score_items(model, [shared])
    except Exception as error:  # models that do not support the mask or the positions can raise any type
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            raise
        return False
    # A different summation order can cost one rounding unit per token; TF32 has a 10-bit mantissa.
    dtype, device_type = get_compute_dtype(model), next(model.parameters()).device.type
    is_tf32 = dtype == torch.float32 and device_type == "cuda" and torch.get_float32_matmul_precision() != "highest"
    unit = 2**-10 if is_tf32 else torch.finfo(dtype).eps
    return not all(map(math.isfinite, expected)) or all(
        abs(one - other) <= 1e-3 + unit * abs(other) for one, other in zip(nll, expected, strict=True)
    )
