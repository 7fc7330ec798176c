"""Validation loss of a causal language model, on the same tokens for any hardware."""

import math
from dataclasses import dataclass
from inspect import signature

import torch
from accelerate import Accelerator
from torch import nn

from ..data.dataset import Windows
from .scoring import evaluation_mode, head_without_autocast


@dataclass(frozen=True)
class ValidationResult:
    """Validation loss.

    Attributes:
        loss: nats per token.
        bpb: bits per UTF-8 byte of the text.
        n_tokens: number of tokens predicted.
    """

    loss: float
    bpb: float
    n_tokens: int


def evaluate_loss(
    model: nn.Module, dataset: Windows, n_windows: int, *, batch_size: int, n_bytes: float, accelerator: Accelerator
) -> ValidationResult:
    """Compute the mean loss on the first `n_windows` windows of `dataset`, each of T+1 tokens.

    The processes split the windows and reduce their sums, so the result depends on the number of processes only in the
    last bits of a float64 sum. The model's training mode is restored.

    Args:
        model: any causal language model, neither wrapped nor compiled.
        batch_size: windows per forward pass; affects only speed and memory.
        n_bytes: UTF-8 bytes of the text that the targets of these windows encode (see `data.text_bytes`).
    """
    windows = range(min(n_windows, len(dataset)))[accelerator.process_index :: accelerator.num_processes]
    sums = torch.zeros(2, dtype=torch.float64)  # nats, tokens
    with evaluation_mode(model), accelerator.autocast():
        for start in range(0, len(windows), batch_size):
            batch = torch.stack([dataset[window] for window in windows[start : start + batch_size]])
            n_tokens = batch[:, 1:].numel()
            mean_loss = _compute_loss(model, batch.to(accelerator.device)).item()
            sums += torch.tensor([mean_loss * n_tokens, n_tokens], dtype=torch.float64)
    # Only with a process group do the sums move to the device: MPS has no float64, but gloo and NCCL both reduce it.
    if accelerator.num_processes > 1:
        sums = accelerator.reduce(sums.to(accelerator.device), reduction="sum").cpu()
    nats, tokens = sums.tolist()
    bpb = nats / math.log(2) / n_bytes if n_bytes else math.nan
    return ValidationResult(nats / tokens, bpb, int(tokens))


def _compute_loss(model: nn.Module, windows: torch.Tensor) -> torch.Tensor:
    """Return the mean loss in nats on windows (batch, T+1)."""
    inputs, targets = windows[:, :-1], windows[:, 1:].contiguous()
    # Our model can skip the logits, which take most of the memory. From other models, use only the logits: they handle
    # labels in different ways, and those in transformers ignore labels that are already shifted.
    if "skip_logits" in signature(model.forward).parameters:
        return model(input_ids=inputs, shift_labels=targets, use_cache=False, skip_logits=True).loss
    with head_without_autocast(model):
        logits = model(input_ids=inputs, use_cache=False).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
