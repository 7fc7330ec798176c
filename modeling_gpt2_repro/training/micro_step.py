"""One micro-step, windows in and loss out, and the trial that finds out what the device can do."""

import contextlib
import time
from collections.abc import Callable

import torch
import torch._functorch.config as functorch_config
from accelerate import Accelerator
from torch import nn
from torch._dynamo.exc import TorchDynamoException
from torch._inductor.exc import InductorError
from torch.utils.data import Dataset

from modeling_gpt2_repro.devices import can_compile, is_out_of_memory, return_freed_memory
from modeling_gpt2_repro.errors import UserError


class WindowLoss(nn.Module):
    """The mean loss of a causal language model on windows of T+1 tokens.

    It is this wrapper that is compiled and distributed, so that the model inside stays the plain module which
    evaluation, sampling and saving use, at any shape and without recompiling.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        """Return the mean loss in nats a token, a scalar, of windows of shape (batch, T+1)."""
        targets = windows[:, 1:].contiguous()
        return self.model(input_ids=windows[:, :-1], shift_labels=targets, use_cache=False).loss


def fit_micro_batch(
    loss_model: nn.Module,
    dataset: Dataset,
    sizes: list[int],
    compile: str,
    accelerator: Accelerator,
    say: Callable[[str], None],
) -> tuple[nn.Module, int, float]:
    """Find out by trial what the device can do.

    Returns `loss_model`, compiled where `compile` (`auto`, `on` or `off`) and the machine allow, the first of the
    micro-batch `sizes` that fits in memory, and the seconds a token that it trains at. The model must be on its device
    and not distributed; its weights and gradients are left as they were. Every process takes the same answer.

    Raises:
        UserError: not even the smallest size fits.
    """
    if compile == "on" or (compile == "auto" and can_compile(accelerator.device)):
        try:
            say("compiling the training step, which takes a minute or so")
            compiled = torch.compile(loss_model)
            with _recompute_cheap_activations(accelerator.device):
                return compiled, *_try_sizes(compiled, dataset, sizes, accelerator)
        except (TorchDynamoException, InductorError) as error:
            say(f"torch.compile failed, so the run is eager: {str(error).strip().splitlines()[0]}")
            torch._dynamo.reset()
    elif compile == "auto":
        say("torch.compile is off: there is no compiler for this device (a C++ compiler, on a CPU)")
    return loss_model, *_try_sizes(loss_model, dataset, sizes, accelerator)


def _recompute_cheap_activations(device: torch.device) -> contextlib.AbstractContextManager:
    """Where a CPU compiles, let the backward pass compute GELUs, layer norms and bfloat16 weights a second time.

    By default the compiler keeps what feeds a matrix product: 0.4 GB for GPT-2 124M and 2,048 tokens, where computing
    it again takes no measurable time. On a GPU nothing of this was measured, so its compiler decides.
    """
    if device.type != "cpu":
        return contextlib.nullcontext()
    return functorch_config.patch(ban_recompute_materialized_backward=False)


def _try_sizes(
    loss_model: nn.Module, dataset: Dataset, sizes: list[int], accelerator: Accelerator
) -> tuple[int, float]:
    # What training will hold besides: AdamW's two moments, and the buckets in which gradients are exchanged.
    reserved = [torch.empty_like(p) for p in loss_model.parameters() for _ in range(3) if p.is_cuda]
    for size in sizes:
        seconds, fits = 0.0, True
        try:
            seconds = _time_micro_step(loss_model, dataset, size, accelerator)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            fits = False
        loss_model.zero_grad(set_to_none=True)
        if not fits and accelerator.device.type == "cuda":
            torch.cuda.empty_cache()
        if accelerator.num_processes > 1:
            outcomes = accelerator.gather(torch.tensor([[seconds, float(fits)]], device=accelerator.device))
            seconds, fits = outcomes[:, 0].max().item(), bool(outcomes[:, 1].min())
        if fits:
            del reserved
            if accelerator.device.type == "cpu":
                return_freed_memory()
            return size, seconds / (size * (len(dataset[0]) - 1))
    raise UserError(
        f"even {sizes[-1]} sequence(s) at once do not fit in the device's memory: use "
        + ("--micro_batch_size auto, " if sizes[-1] > 1 else "")
        + "--gradient_checkpointing, a shorter --sequence_length or a smaller --model_size"
    )


def _time_micro_step(loss_model: nn.Module, dataset: Dataset, size: int, accelerator: Accelerator) -> float:
    # On its own, so that nothing of an attempt that did not fit is still held when the next one begins.
    windows = torch.stack([dataset[index % len(dataset)] for index in range(size)]).to(accelerator.device)
    for _ in range(3):  # the first ones allocate and compile, the last one is measured
        start = time.perf_counter()
        with accelerator.autocast():
            loss = loss_model(windows)
        loss.backward()
        loss.item()
        seconds = time.perf_counter() - start
    return seconds
