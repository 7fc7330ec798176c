"""Where a run's model meets its device: it is placed, compiled, given a micro-batch that fits, and distributed."""

from collections.abc import Callable
from dataclasses import replace

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from ..core.devices import measure_device_memory, name_hardware
from ..core.errors import UserError
from ..data.dataset import TokenDataset
from ..modeling_gpt2_repro import GPT2ReproForCausalLM
from ..training import checkpoint as checkpoints
from .batch_fit import Fit, WindowLoss, fit_micro_batch, settle_gradient_exchange
from .checkpoint import TrainingState
from .faults import explained_out_of_memory
from .memory import StepMemory
from .plan import Plan
from .start import Start


def place_on_device(model: GPT2ReproForCausalLM, memory: StepMemory, accelerator: Accelerator) -> GPT2ReproForCausalLM:
    """Move the model to the device.

    Raises:
        UserError: its weights alone do not fit, in one process at least.
    """
    message = None
    try:
        model = model.to(accelerator.device)
    except torch.OutOfMemoryError:
        available = measure_device_memory(accelerator.device)
        advice = memory.advise(available)
        message = (
            f"the weights of {model.num_parameters():,} parameters alone do not fit in the memory of device "
            f"{accelerator.process_index}, of which {available / 1e9:.1f} GB are free: "
            f"use {advice or 'a smaller --model_size, or another device'}"
        )
    for each in gather_object([message]):
        if each is not None:
            raise UserError(each)
    return model


def fit_to_device(
    plan: Plan,
    memory: StepMemory,
    start: Start,
    train_set: TokenDataset,
    model: GPT2ReproForCausalLM,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    say: Callable[[str], None],
) -> tuple[Fit, torch.optim.Optimizer]:
    """Compile the loss if that works, find the largest micro-batch that fits, restore the optimizer, and distribute.

    Raises:
        UserError: not even the smallest size fits, or the optimizer's state cannot be read.
    """
    sizes, advice = choose_sizes(plan.micro_batch_sizes, memory, start.state, accelerator)
    fit = fit_micro_batch(WindowLoss(model), train_set, sizes, plan.config.compile, accelerator, say, advice)
    # Not before the trial, which keeps room for what this brings.
    if start.checkpoint:
        checkpoints.load_optimizer_state(start.checkpoint, optimizer, accelerator.scaler)
    loss_model, optimizer = accelerator.prepare(fit.loss_model, optimizer)
    with explained_out_of_memory(sizes, fit.micro_batch_size):
        settle_gradient_exchange(loss_model, train_set, fit.micro_batch_size, accelerator)
    return replace(fit, loss_model=loss_model), optimizer


def choose_sizes(
    sizes: list[int], memory: StepMemory, state: TrainingState | None, accelerator: Accelerator
) -> tuple[list[int], str]:
    """Return which of the micro-batch `sizes` to try, largest first, and what would fit if none does.

    A run resumed on the same hardware begins with its own size, which decides the last bits of its updates; on a GPU
    any other begins with what should fit.
    """
    calculated, advice = sizes, ""
    if accelerator.device.type == "cuda":
        available = min(gather_object([measure_device_memory(accelerator.device)]))
        calculated, advice = memory.skip_too_large(sizes, available), memory.advise(available)
    is_known = state and state.hardware == name_hardware(accelerator) and state.micro_batch_size in sizes
    is_known = all(gather_object([is_known]))  # or processes on other devices would try other sizes
    return (sizes[sizes.index(state.micro_batch_size) :] if is_known else calculated), advice
