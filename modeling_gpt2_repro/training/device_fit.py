"""Where a run's model meets its device: it is placed, compiled, and given a micro-batch that fits."""

from collections.abc import Callable

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from modeling_gpt2_repro.configuration_gpt2_repro import MODEL_SIZES
from modeling_gpt2_repro.core.devices import measure_device_memory, name_hardware
from modeling_gpt2_repro.core.errors import UserError
from modeling_gpt2_repro.data.dataset import TokenDataset
from modeling_gpt2_repro.modeling_gpt2_repro import LOSS_CHUNK_TOKENS, GPT2ReproForCausalLM
from modeling_gpt2_repro.training.batch_fit import Fit, WindowLoss, fit_micro_batch
from modeling_gpt2_repro.training.checkpoint import TrainingState
from modeling_gpt2_repro.training.config import TrainingConfig
from modeling_gpt2_repro.training.memory import StepMemory


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
    accelerator: Accelerator,
    model: GPT2ReproForCausalLM,
    train_set: TokenDataset,
    sizes: list[int],
    state: TrainingState | None,
    say: Callable[[str], None],
) -> Fit:
    """Compile the loss where that works, and find the first of the micro-batch `sizes`, largest first, that fits.

    A run resumed on the same hardware begins with its own, which decides the last bits of its updates; on a GPU any
    other begins with what should fit.

    Raises:
        UserError: not even the smallest fits.
    """
    calculated, advice = sizes, ""
    if accelerator.device.type == "cuda":
        memory = describe_step_memory(config, accelerator, model)
        available = min(gather_object([measure_device_memory(accelerator.device)]))
        calculated, advice = memory.skip_too_large(sizes, available), memory.advise(available, MODEL_SIZES)
    is_known = state and state.hardware == name_hardware(accelerator) and state.micro_batch_size in sizes
    is_known = all(gather_object([is_known]))  # or processes on other devices would try other sizes
    sizes = sizes[sizes.index(state.micro_batch_size) :] if is_known else calculated
    return fit_micro_batch(WindowLoss(model), train_set, sizes, config.compile, accelerator, say, advice)
