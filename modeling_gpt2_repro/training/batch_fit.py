"""One micro-step, windows in and loss out, and the trial that finds out what the device can do."""

import contextlib
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch._functorch.config as functorch_config
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from torch._dynamo import OptimizedModule
from torch._dynamo.exc import TorchDynamoException
from torch.utils.data import Dataset

from ..core.devices import can_compile, is_out_of_memory, return_freed_memory
from ..core.errors import UserError
from .optim import N_MOMENTS


class WindowLoss(nn.Module):
    """The mean loss of a causal language model on windows of T+1 tokens.

    It is this wrapper that is compiled and distributed, so that the model inside stays the plain module which
    evaluation, sampling and saving use, at any shape and without recompiling.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        """Return the mean loss in nats per token, a scalar, of windows of shape (batch, T+1)."""
        targets = windows[:, 1:].contiguous()
        return self.model(input_ids=windows[:, :-1], shift_labels=targets, use_cache=False).loss


@dataclass(frozen=True)
class Fit:
    """What a trial found out: the loss, compiled or not, the sequences at once, and the seconds that a token takes."""

    loss_model: nn.Module
    micro_batch_size: int
    seconds_per_token: float


@dataclass(frozen=True)
class Outcome:
    """What one size came to in one process: it ran in `seconds`, did not fit, or did not compile."""

    seconds: float = 0.0
    fits: bool = True
    compiler_error: str | None = None


class CompilationError(Exception):
    """The compiler failed in one process at least, and with this every process knows."""


def fit_micro_batch(
    loss_model: nn.Module,
    dataset: Dataset,
    sizes: Sequence[int],
    compile: str,
    accelerator: Accelerator,
    say: Callable[[str], None],
    advice: str = "",
) -> Fit:
    """Find out by trial what the device can do.

    `loss_model` is compiled where `compile` (`auto`, `on` or `off`) and the machine allow, and the first of the
    micro-batch `sizes` that fits in memory is taken. Every process takes the same answer: one whose compiler fails, or
    whose memory is full, decides for all. The model must be on its device, not distributed and without an optimizer's
    moments, for which room is kept; its weights and gradients are left as they were.

    Args:
        advice: what would fit where no size does, if that is known.

    Raises:
        UserError: not even the smallest size fits, or the compiler failed that had to be `on`.
    """
    if compile != "off":
        reason, compiled = _compile(loss_model, compile, accelerator.device)
        try:
            _agree_to_compile(reason, accelerator)
            say("compiling the training step, which takes a minute or so")
            with _recompute_cheap_activations(accelerator.device):
                return _try_sizes(compiled, dataset, sizes, accelerator, advice)
        except CompilationError as error:
            if compile == "on":
                raise UserError(f"--compile on: {error} (with auto the run is eager where that fails)") from error
            say(f"{'all processes run' if accelerator.num_processes > 1 else 'the run goes on'} eagerly: {error}")
            torch._dynamo.reset()
    return _try_sizes(loss_model, dataset, sizes, accelerator, advice)


def settle_gradient_exchange(loss_model: nn.Module, dataset: Dataset, size: int, accelerator: Accelerator) -> None:
    """Let `DistributedDataParallel` order its buckets before the first update.

    It orders them anew after the first gradients that it exchanges, by when these came. Where a gradient lies in them
    decides in which order three or more processes add it up, so that the first update of a resumed run would have
    other last bits than the same update in the middle of a run. The weights are left as they were.
    """
    if accelerator.num_processes > 1:
        loss_model(_stack_windows(dataset, size).to(accelerator.device)).backward()
        loss_model.zero_grad(set_to_none=True)


def _stack_windows(dataset: Dataset, size: int) -> torch.Tensor:
    return torch.stack([dataset[index % len(dataset)] for index in range(size)])


def _compile(loss_model: nn.Module, compile: str, device: torch.device) -> tuple[str | None, nn.Module]:
    """Return why this process cannot compile, `None` where it seems to, and the module that does at its first call."""
    if compile == "auto" and not can_compile(device):
        return "there is no compiler for this device (a C++ compiler, on a CPU)", loss_model
    if torch._dynamo.config.disable:
        return "TORCHDYNAMO_DISABLE or TORCH_COMPILE_DISABLE is set", loss_model
    try:
        # A size is compiled for itself: one graph for all of them would have to be traced for each all the same.
        return None, torch.compile(loss_model, dynamic=False)
    except Exception as error:
        return _describe(error), loss_model


def _agree_to_compile(reason: str | None, accelerator: Accelerator) -> None:
    """Raise a `CompilationError` in every process where one of them has a reason not to compile."""
    for process, other in enumerate(gather_object([reason])):
        if other is not None:
            raise CompilationError(f"torch.compile is off{_name_process(process, accelerator)}: {other}")


def _recompute_cheap_activations(device: torch.device) -> contextlib.AbstractContextManager:
    """Where a CPU compiles, let the backward pass compute GELUs, layer norms and bfloat16 weights a second time.

    By default the compiler keeps what feeds a matrix product: 0.4 GB for GPT-2 124M and 2,048 tokens, where computing
    it again takes no measurable time. On a GPU nothing of this was measured, so its compiler decides.
    """
    if device.type != "cpu":
        return contextlib.nullcontext()
    return functorch_config.patch(ban_recompute_materialized_backward=False)


def _try_sizes(
    loss_model: nn.Module, dataset: Dataset, sizes: Sequence[int], accelerator: Accelerator, advice: str
) -> Fit:
    for size in sizes:
        outcomes = gather_object([_try_micro_step(loss_model, dataset, size, accelerator)])
        loss_model.zero_grad(set_to_none=True)
        for process, outcome in enumerate(outcomes):
            if outcome.compiler_error is not None:
                raise CompilationError(
                    f"torch.compile failed{_name_process(process, accelerator)}: {outcome.compiler_error}"
                )
        if all(outcome.fits for outcome in outcomes):
            if accelerator.device.type == "cpu":
                return_freed_memory()
            n_tokens = size * (len(dataset[0]) - 1)
            return Fit(loss_model, size, max(outcome.seconds for outcome in outcomes) / n_tokens)
        # The next size needs the memory of this one, and its place among the graphs that the compiler keeps at most.
        torch._dynamo.reset()
        gc.collect()
        if accelerator.device.type == "cuda":
            torch.cuda.empty_cache()
    generally = "--gradient_checkpointing True, a shorter --sequence_length or a smaller --model_size"
    raise UserError(
        f"even {sizes[-1]} sequence(s) at once do not fit in the device's memory: use "
        + ("--micro_batch_size auto, " if sizes[-1] > 1 else "")
        + (advice or generally)
    )


def _try_micro_step(loss_model: nn.Module, dataset: Dataset, size: int, accelerator: Accelerator) -> Outcome:
    try:
        return Outcome(_time_micro_step(loss_model, dataset, size, accelerator))
    except UserError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            return Outcome(fits=False)
        # What is wrong with the model itself comes up again without the compiler.
        if isinstance(loss_model, OptimizedModule):
            return Outcome(compiler_error=_describe(error))
        raise


def _describe(error: Exception) -> str:
    """Say why nothing is compiled: a compiler starts programs and threads, writes to caches, and raises anything."""
    reason = next(iter(str(error).strip().splitlines()), "")
    return reason if isinstance(error, TorchDynamoException) else f"{type(error).__name__}: {reason}"


def _time_micro_step(loss_model: nn.Module, dataset: Dataset, size: int, accelerator: Accelerator) -> float:
    # On its own, so that nothing of an attempt that did not fit is still held when the next one begins.
    # What training will hold besides: the moments, and the buckets in which gradients are exchanged.
    reserved = [torch.empty_like(p) for p in loss_model.parameters() for _ in range(N_MOMENTS + 1) if p.is_cuda]
    windows = _stack_windows(dataset, size).to(accelerator.device)
    for _ in range(3):  # the first ones allocate and compile, the last one is measured
        start = time.perf_counter()
        with accelerator.autocast():
            loss = loss_model(windows)
        loss.backward()
        loss.item()
        seconds = time.perf_counter() - start
    del reserved
    return seconds


def _name_process(process: int, accelerator: Accelerator) -> str:
    return f" in process {process}" if accelerator.num_processes > 1 else ""
