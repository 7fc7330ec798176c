"""One micro-step, from windows to loss, and the trial that finds what the device can run."""

import contextlib
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch._functorch.config as functorch_config
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from torch._dynamo import OptimizedModule
from torch._dynamo.exc import TorchDynamoException

from ..core.devices import can_compile, is_out_of_memory, return_freed_memory
from ..core.errors import UserError
from ..data.dataset import Windows
from .optim import N_MOMENTS


class WindowLoss(nn.Module):
    """The mean loss of a causal language model on windows of T+1 tokens.

    This wrapper is what gets compiled and distributed. The model inside stays a plain module, which evaluation,
    sampling and saving use at any shape without recompiling.
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
    """The result of a trial: the loss, compiled or not, the micro-batch size in sequences, and seconds per token."""

    loss_model: nn.Module
    micro_batch_size: int
    seconds_per_token: float


@dataclass(frozen=True)
class Outcome:
    """The outcome of one size on one rank: it ran in `seconds`, did not fit, or did not compile."""

    seconds: float = 0.0
    fits: bool = True
    compiler_error: str | None = None


class CompilationError(Exception):
    """The compiler failed on at least one rank; raised on every rank."""


def fit_micro_batch(
    loss_model: nn.Module,
    dataset: Windows,
    sizes: Sequence[int],
    compile: str,
    accelerator: Accelerator,
    say: Callable[[str], None],
    advice: str = "",
) -> Fit:
    """Find by trial whether the loss compiles and which micro-batch size fits.

    The loss is compiled if `compile` (`auto`, `on` or `off`) and the machine allow it. The first of `sizes` that fits
    in memory is used. All ranks make the same choice: a compiler error or lack of memory on one decides for all. The
    model must be on its device and not distributed. The optimizer's moments must not exist yet; room is reserved for
    them. Weights and gradients are unchanged afterwards.

    Args:
        sizes: micro-batch sizes in sequences, largest first.
        advice: what would fit if no size does, if known.

    Raises:
        UserError: the smallest size does not fit, or `compile` is `on` and the compiler failed.
    """
    if compile != "off":
        reason, compiled = _compile(loss_model, compile, accelerator.device)
        try:
            _agree_to_compile(reason, accelerator)
            say("compiling the training step, which takes about a minute")
            with _recompute_cheap_activations(accelerator.device):
                return _try_sizes(compiled, dataset, sizes, accelerator, advice)
        except CompilationError as error:
            if compile == "on":
                raise UserError(f"--compile on: {error} (--compile auto falls back to eager mode)") from error
            say(f"falling back to eager mode{' in all processes' if accelerator.num_processes > 1 else ''}: {error}")
            torch._dynamo.reset()
    return _try_sizes(loss_model, dataset, sizes, accelerator, advice)


def settle_gradient_exchange(loss_model: nn.Module, dataset: Windows, size: int, accelerator: Accelerator) -> None:
    """Let `DistributedDataParallel` settle its buckets before the first update.

    It rebuilds its buckets after the first backward pass, in the order in which gradients became ready. With three or
    more ranks, a gradient's position in the buckets determines the order of summation, so the first update of a
    resumed run would differ in its last bits from the same update of an uninterrupted run. The weights are unchanged.
    """
    if accelerator.num_processes > 1:
        loss_model(_stack_windows(dataset, size).to(accelerator.device)).backward()
        loss_model.zero_grad(set_to_none=True)


def _stack_windows(dataset: Windows, size: int) -> torch.Tensor:
    return torch.stack([dataset[index % len(dataset)] for index in range(size)])


def _compile(loss_model: nn.Module, compile: str, device: torch.device) -> tuple[str | None, nn.Module]:
    """Return why this rank cannot compile (`None` if it can), and the module, which compiles at its first call."""
    if compile == "auto" and not can_compile(device):
        return "there is no compiler for this device (a C++ compiler, on a CPU)", loss_model
    if torch._dynamo.config.disable:
        return "TORCHDYNAMO_DISABLE or TORCH_COMPILE_DISABLE is set", loss_model
    try:
        # One graph per size: a dynamic one would be traced again for each size anyway.
        compiled: Any = torch.compile(loss_model, dynamic=False)  # a module, as its argument
        return None, compiled
    except Exception as error:
        return _describe(error), loss_model


def _agree_to_compile(reason: str | None, accelerator: Accelerator) -> None:
    """Raise a `CompilationError` on every rank if any rank has a reason not to compile."""
    for process, other in enumerate(gather_object([reason])):
        if other is not None:
            raise CompilationError(f"torch.compile is off{_name_process(process, accelerator)}: {other}")


def _recompute_cheap_activations(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """On a CPU, let the compiled backward pass recompute GELUs, layer norms and bfloat16 weights.

    By default the compiler saves the inputs of matrix products: 0.4 GB for GPT-2 124M and 2,048 tokens, although
    recomputing them takes no measurable time. We have not measured this on a GPU, so its default stays.
    """
    if device.type != "cpu":
        return contextlib.nullcontext()
    return functorch_config.patch(ban_recompute_materialized_backward=False)


def _try_sizes(
    loss_model: nn.Module, dataset: Windows, sizes: Sequence[int], accelerator: Accelerator, advice: str
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
        # The next size needs this one's memory, and its place in the compiler's limited cache of graphs.
        torch._dynamo.reset()
        gc.collect()
        if accelerator.device.type == "cuda":
            torch.cuda.empty_cache()
    general_advice = "--gradient_checkpointing True, a shorter --sequence_length or a smaller --model_size"
    raise UserError(
        f"even {sizes[-1]} sequence(s) per micro-step do not fit in the device's memory: use "
        + ("--micro_batch_size auto, " if sizes[-1] > 1 else "")
        + (advice or general_advice)
    )


def _try_micro_step(loss_model: nn.Module, dataset: Windows, size: int, accelerator: Accelerator) -> Outcome:
    try:
        return Outcome(_time_micro_step(loss_model, dataset, size, accelerator))
    except UserError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            return Outcome(fits=False)
        # An error of the model itself will come up again in eager mode.
        if isinstance(loss_model, OptimizedModule):
            return Outcome(compiler_error=_describe(error))
        raise


def _describe(error: Exception) -> str:
    """Describe a compiler's error, of any type: it starts programs and threads, and writes to caches."""
    reason = next(iter(str(error).strip().splitlines()), "")
    return reason if isinstance(error, TorchDynamoException) else f"{type(error).__name__}: {reason}"


def _time_micro_step(loss_model: nn.Module, dataset: Windows, size: int, accelerator: Accelerator) -> float:
    # A function of its own, so that a failed attempt leaves no tensors behind.
    # Training will also need the optimizer's moments and the buckets of the gradient exchange.
    reserved = [torch.empty_like(p) for p in loss_model.parameters() for _ in range(N_MOMENTS + 1) if p.is_cuda]
    windows = _stack_windows(dataset, size).to(accelerator.device)
    for _ in range(3):  # the first two allocate and compile, the last is timed
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
