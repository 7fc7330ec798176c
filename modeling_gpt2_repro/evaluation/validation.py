"""Validation: the loss of a causal language model on the same tokens on any hardware."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import TypeVar

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import Dataset

from modeling_gpt2_repro.core.devices import is_out_of_memory
from modeling_gpt2_repro.core.errors import UserError
from modeling_gpt2_repro.evaluation.scoring import evaluation_mode, head_without_autocast

Result = TypeVar("Result")


@dataclass(frozen=True)
class ValidationResult:
    """Attributes: `loss` in nats per token, `bpb` in bits per UTF-8 byte of the text, `n_tokens` predicted."""

    loss: float
    bpb: float
    n_tokens: int


def evaluate_loss(
    model: nn.Module,
    dataset: Dataset,
    n_windows: int,
    *,
    batch_size: int,
    n_bytes: float,
    accelerator: Accelerator,
) -> ValidationResult:
    """Compute the mean loss on the first `n_windows` windows of `dataset`, each of T+1 tokens.

    The processes divide the windows and reduce their sums, so the result does not depend on their number, up to the
    last bits of a float64 sum. The model's training mode is restored.

    Args:
        model: any causal language model, neither wrapped nor compiled.
        batch_size: windows in one forward pass; changes speed and memory only.
        n_bytes: UTF-8 bytes of the text that the targets of these windows stand for (see `data.text_bytes`).
    """
    windows = range(min(n_windows, len(dataset)))[accelerator.process_index :: accelerator.num_processes]
    sums = torch.zeros(2, dtype=torch.float64)  # nats, tokens
    can_skip_logits = "skip_logits" in signature(model.forward).parameters
    with evaluation_mode(model), accelerator.autocast():
        for start in range(0, len(windows), batch_size):
            batch = torch.stack([dataset[window] for window in windows[start : start + batch_size]])
            targets = batch[:, 1:].contiguous()
            mean_loss = _compute_loss(
                model, batch[:, :-1].to(accelerator.device), targets.to(accelerator.device), can_skip_logits
            )
            sums += torch.tensor([mean_loss.item() * targets.numel(), targets.numel()], dtype=torch.float64)
    # MPS has no float64, and gloo and NCCL both reduce it, so only a process group moves the sums to the device.
    if accelerator.num_processes > 1:
        sums = accelerator.reduce(sums.to(accelerator.device), reduction="sum").cpu()
    nats, tokens = sums.tolist()
    return ValidationResult(
        loss=nats / tokens, bpb=nats / math.log(2) / n_bytes if n_bytes else math.nan, n_tokens=int(tokens)
    )


def measure_loss(
    model: nn.Module,
    dataset: Dataset,
    n_windows: int,
    *,
    largest_batch_size: int,
    n_bytes: float,
    accelerator: Accelerator,
) -> ValidationResult:
    """Compute what `evaluate_loss` does, with the largest batch size that fits in memory.

    Each process halves its batch size by itself, because no number depends on it.

    Raises:
        UserError: not even one window fits, or the loss is not finite.
    """
    evaluate = partial(evaluate_loss, model, dataset, n_windows, n_bytes=n_bytes, accelerator=accelerator)
    result = halve_until_it_fits(evaluate, largest_batch_size)
    if not math.isfinite(result.loss):
        raise UserError(
            "the model's validation loss is not finite: its weights are broken, or its precision is too low "
            "(try --mixed_precision no)"
        )
    return result


def halve_until_it_fits(function: Callable[..., Result], batch_size: int) -> Result:
    """Return `function(batch_size=...)`, with half the batch size each time that memory runs out.

    Raises:
        UserError: memory does not suffice for a batch of one.
    """
    while True:
        try:
            return function(batch_size=batch_size)
        except Exception as error:  # out of memory has many types (see `is_out_of_memory`)
            if not is_out_of_memory(error):
                raise
            if batch_size == 1:
                raise UserError(
                    "not even one sequence fits in the device's memory: use a shorter --sequence_length"
                ) from error
        batch_size //= 2


def _compute_loss(
    model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor, can_skip_logits: bool
) -> torch.Tensor:
    # Our model can skip the logits, which take most of the memory. Other models are asked for nothing but logits: how
    # their `forward` takes labels differs, and those in transformers ignore labels that are shifted already.
    if can_skip_logits:
        return model(input_ids=inputs, shift_labels=targets, use_cache=False, skip_logits=True).loss
    with head_without_autocast(model):
        logits = model(input_ids=inputs, use_cache=False).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
