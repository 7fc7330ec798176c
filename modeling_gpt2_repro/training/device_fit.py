"""Where a run's model meets its device: it is placed, compiled, given a micro-batch that fits, and distributed."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from modeling_gpt2_repro.configuration_gpt2_repro import MODEL_SIZES
from modeling_gpt2_repro.core.devices import (
    get_largest_micro_batch_size,
    measure_device_memory,
    name_hardware,
)
from modeling_gpt2_repro.core.errors import UserError
from modeling_gpt2_repro.data.dataset import TokenDataset
from modeling_gpt2_repro.modeling_gpt2_repro import LOSS_CHUNK_TOKENS, GPT2ReproForCausalLM
from modeling_gpt2_repro.training import checkpoint as checkpoints
from modeling_gpt2_repro.training.batch_fit import WindowLoss, fit_micro_batch, settle_gradient_exchange
from modeling_gpt2_repro.training.config import TrainingConfig
from modeling_gpt2_repro.training.faults import explained_out_of_memory
from modeling_gpt2_repro.training.memory import StepMemory
from modeling_gpt2_repro.training.start import Start


@dataclass(frozen=True)
class FittedStep:
    """What a training step runs with on its device.

    Attributes:
        loss_model: the model in the wrapper that is compiled and distributed.
        optimizer: with the state of the checkpoint that the run resumes from.
        micro_batch_size: sequences at once.
        seconds_per_token: of one process, measured.
    """

    loss_model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    micro_batch_size: int
    seconds_per_token: float


def place_on_device(
    config: TrainingConfig, accelerator: Accelerator, model: GPT2ReproForCausalLM
) -> GPT2ReproForCausalLM:
    """Move the model to the device.

    Raises:
        UserError: its weights alone do not fit, in one process at least.
    """
    message = None
    try:
        model = model.to(accelerator.device)
    except torch.OutOfMemoryError:
        available = measure_device_memory(accelerator.device)
        advice = describe_step_memory(config, accelerator, model).advise(available, MODEL_SIZES)
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
    config: TrainingConfig,
    start: Start,
    train_set: TokenDataset,
    model: GPT2ReproForCausalLM,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    say: Callable[[str], None],
) -> FittedStep:
    """Compile the loss if that works, find the largest micro-batch that fits, and restore and distribute the rest.

    Raises:
        UserError: not even the smallest size fits, or the optimizer's state cannot be read.
    """
    largest = get_largest_micro_batch_size(accelerator.device, config.sequence_length)
    sizes, advice = choose_sizes(
        config, config.list_micro_batch_sizes(accelerator.num_processes, largest), start, model, accelerator
    )
    fit = fit_micro_batch(WindowLoss(model), train_set, sizes, config.compile, accelerator, say, advice)
    # Not before the trial, which keeps room for what this brings.
    if start.checkpoint:
        checkpoints.load_optimizer_state(start.checkpoint, optimizer, accelerator.scaler)
    loss_model, optimizer = accelerator.prepare(fit.loss_model, optimizer)
    with explained_out_of_memory(sizes, fit.micro_batch_size):
        settle_gradient_exchange(loss_model, train_set, fit.micro_batch_size, accelerator)
    return FittedStep(loss_model, optimizer, fit.micro_batch_size, fit.seconds_per_token)


def choose_sizes(
    config: TrainingConfig, sizes: list[int], start: Start, model: GPT2ReproForCausalLM, accelerator: Accelerator
) -> tuple[list[int], str]:
    """Return the micro-batch sizes to try, largest first, and what would fit if none does.

    A run resumed on the same hardware begins with its own size, which decides the last bits of its updates; on a GPU
    any other begins with what should fit.
    """
    calculated, advice, state = sizes, "", start.state
    if accelerator.device.type == "cuda":
        memory = describe_step_memory(config, accelerator, model)
        available = min(gather_object([measure_device_memory(accelerator.device)]))
        calculated, advice = memory.skip_too_large(sizes, available), memory.advise(available, MODEL_SIZES)
    is_known = state and state.hardware == name_hardware(accelerator) and state.micro_batch_size in sizes
    is_known = all(gather_object([is_known]))  # or processes on other devices would try other sizes
    return (sizes[sizes.index(state.micro_batch_size) :] if is_known else calculated), advice


def describe_step_memory(config: TrainingConfig, accelerator: Accelerator, model: GPT2ReproForCausalLM) -> StepMemory:
    """Describe the memory of a step on a GPU."""
    return StepMemory(
        n_layer=model.config.n_layer,
        n_embd=model.config.n_embd,
        vocab_size=model.config.vocab_size,
        n_positions=model.config.n_positions,
        sequence_length=config.sequence_length,
        compute_bytes=4 if accelerator.mixed_precision == "no" else 2,
        is_checkpointed=config.gradient_checkpointing,
        loss_chunk_tokens=config.loss_chunk_tokens or LOSS_CHUNK_TOKENS["cuda"],
    )
