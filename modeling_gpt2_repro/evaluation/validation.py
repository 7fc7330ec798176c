"""Validation: the loss on a fixed set of tokens, the same on any hardware."""

import math
from dataclasses import dataclass
from inspect import signature

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import Dataset

from modeling_gpt2_repro.evaluation.scoring import evaluation_mode, head_without_autocast


@dataclass(frozen=True)
class ValidationResult:
    """Attributes: `loss` in nats a token, `bpb` in bits a UTF-8 byte of the text, `n_tokens` predicted."""

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
    """Compute the mean loss of `model` on the first `n_windows` windows of `dataset`, each of T+1 tokens.

    Every process takes its share of the windows and the sums are reduced, so the result does not depend on their
    number (up to the last bits of a float64 sum). `model` is any causal language model, raw, and stays in the mode it
    was in.

    Args:
        batch_size: windows at once; changes speed and memory only.
        n_bytes: the UTF-8 bytes of the text that the targets of these windows stand for (see `data.text_bytes`).
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


def _compute_loss(
    model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor, can_skip_logits: bool
) -> torch.Tensor:
    # Ours can do without the logits, which are most of the memory. Of another causal language model nothing but its
    # logits is asked: how `forward` takes labels differs, and transformers' own ignore those that are shifted already.
    if can_skip_logits:
        return model(input_ids=inputs, shift_labels=targets, use_cache=False, skip_logits=True).loss
    with head_without_autocast(model):
        logits = model(input_ids=inputs, use_cache=False).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
