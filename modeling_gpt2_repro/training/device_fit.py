"""Fitting a run's model to its device: placing, compiling, choosing the micro-batch size, distributing."""

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
        UserError: on every rank, if the weights do not fit on some rank's device.
    """
    message = None
    try:
        model = model.to(accelerator.device)
    except torch.OutOfMemoryError:
        available = measure_device_memory(accelerator.device)
        advice = memory.advise(available)
        message = (
            f"the weights of {model.num_parameters():,} parameters do not fit on device "
            f"{accelerator.process_index}, which has {available / 1e9:.1f} GB free: "
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
    """Compile the loss if possible, find the largest micro-batch that fits, restore the optimizer, and distribute.

    Raises:
        UserError: the smallest micro-batch does not fit, or the optimizer's state cannot be read.
    """
    sizes, advice = choose_sizes(plan.micro_batch_sizes, memory, start.state, accelerator)
    fit = fit_micro_batch(WindowLoss(model), train_set, sizes, plan.config.compile, accelerator, say, advice)
    # After the trial, which reserves room for this state itself.
    if start.checkpoint:
        checkpoints.load_optimizer_state(start.checkpoint, optimizer, accelerator.scaler)
    loss_model, optimizer = accelerator.prepare(fit.loss_model, optimizer)
    with explained_out_of_memory(sizes, fit.micro_batch_size):
        settle_gradient_exchange(loss_model, train_set, fit.micro_batch_size, accelerator)
    return replace(fit, loss_model=loss_model), optimizer


def choose_sizes(
    sizes: list[int], memory: StepMemory, state: TrainingState | None, accelerator: Accelerator
) -> tuple[list[int], str]:
    """Return the micro-batch `sizes` to try, largest first, and advice on what would fit if none does.

    A run resumed on the same hardware starts from its previous size, which determines the last bits of its updates.
    Otherwise, on a GPU, the first size is the largest that is estimated to fit.
    """
    calculated, advice = sizes, ""
    if accelerator.device.type == "cuda":
        available = min(gather_object([measure_device_memory(accelerator.device)]))
        calculated, advice = memory.skip_too_large(sizes, available), memory.advise(available)
    previous = state.micro_batch_size if state and state.hardware == name_hardware(accelerator) else None
    is_known = all(gather_object([previous in sizes]))  # all ranks must try the same sizes
    return (sizes[sizes.index(previous) :] if previous is not None and is_known else calculated), advice
