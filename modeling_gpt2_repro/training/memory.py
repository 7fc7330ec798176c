"""An estimate of the GPU memory of a training step.

It counts what the compiled step saves for its backward pass, according to the code that torch 2.13 generates for CUDA.
It only determines the first size to try and the advice if nothing fits; what fits is decided by trial.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..configuration_gpt2_repro import MODEL_SIZES
from ..modeling_gpt2_repro import LOSS_CHUNK_TOKENS, GPT2ReproForCausalLM
from .config import TrainingConfig
from .optim import N_MOMENTS

# Bytes per parameter in float32: weight, gradient, moments, and gradient buckets.
STATIC_BYTES = 4 * (1 + 1 + N_MOMENTS + 1)
# Values that a block saves per token, in multiples of its width: the residual stream before each layer norm, in
# float32; and in the type of the matrix products queries, keys and values, attention's output, the layer norms'
# outputs, and the MLP's inner layer before and after GELU.
SAVED_IN_FLOAT32, SAVED_IN_COMPUTE_TYPE = 2, 3 + 1 + 2 + 8
SAVED_STATISTICS_BYTES = 0.6  # of layer norms and softmax, per token and unit of width
# The CUDA context, libraries' workspaces, and fragmentation.
OVERHEAD_BYTES = 1e9


@dataclass(frozen=True)
class StepMemory:
    """The parts of a training step that determine its memory.

    Args:
        n_layer, n_embd, vocab_size, n_positions: shape of the model.
        sequence_length: in tokens.
        compute_bytes: bytes per value in matrix products: 2 for bf16 and fp16, 4 for float32.
        is_checkpointed: whether only the blocks' inputs are saved, and the rest is recomputed.
        loss_chunk_tokens: tokens per chunk of logits.
    """

    n_layer: int
    n_embd: int
    vocab_size: int
    n_positions: int
    sequence_length: int
    compute_bytes: int
    is_checkpointed: bool
    loss_chunk_tokens: int

    def count_parameters(self) -> int:
        """Return the number of parameters, counting the tied embedding once."""
        block = 12 * self.n_embd**2 + 13 * self.n_embd
        return self.n_layer * block + (self.vocab_size + self.n_positions + 2) * self.n_embd

    def estimate(self, micro_batch_size: int) -> float:
        """Return the peak memory of a step with this micro-batch size, in bytes."""
        n_tokens = micro_batch_size * self.sequence_length
        saved = 4 * SAVED_IN_FLOAT32 + self.compute_bytes * SAVED_IN_COMPUTE_TYPE + SAVED_STATISTICS_BYTES
        if self.is_checkpointed:  # the residual stream before each block, and everything of one recomputed block
            activations = n_tokens * self.n_embd * (4 * self.n_layer + saved)
        else:
            activations = n_tokens * self.n_embd * saved * self.n_layer
        # One chunk's logits in float32, and their gradient in the compute type.
        loss = min(self.loss_chunk_tokens, n_tokens) * self.vocab_size * (4 + self.compute_bytes)
        casts = self.compute_bytes if self.compute_bytes < 4 else 0
        return self.count_parameters() * (STATIC_BYTES + casts) + activations + loss + OVERHEAD_BYTES

    def skip_too_large(self, sizes: Sequence[int], available_bytes: float) -> list[int]:
        """Return `sizes`, largest first, without those estimated not to fit; the last one always remains."""
        fitting = [size for size in sizes if self.estimate(size) <= available_bytes]
        return fitting or list(sizes[-1:])

    def advise(self, available_bytes: float) -> str:
        """Name what would fit with a micro-batch of one sequence: checkpointing, or the largest smaller models."""
        options = (
            {} if self.is_checkpointed else {"--gradient_checkpointing True": replace(self, is_checkpointed=True)}
        )
        for name, shape in sorted(MODEL_SIZES.items(), key=lambda size: -size[1]["n_embd"]):
            if shape["n_embd"] < self.n_embd:
                options[f"--model_size {name}"] = replace(self, n_layer=shape["n_layer"], n_embd=shape["n_embd"])
        needed = {flags: step.estimate(1) for flags, step in options.items()}
        fitting = [f"{flags} (about {size / 1e9:.1f} GB)" for flags, size in needed.items() if size <= available_bytes]
        return " or ".join(fitting[:2])


def describe_step_memory(config: TrainingConfig, model: GPT2ReproForCausalLM, mixed_precision: str) -> StepMemory:
    """Return the `StepMemory` of a run on a GPU."""
    return StepMemory(
        n_layer=model.config.n_layer,
        n_embd=model.config.n_embd,
        vocab_size=model.config.vocab_size,
        n_positions=model.config.n_positions,
        sequence_length=config.sequence_length,
        compute_bytes=4 if mixed_precision == "no" else 2,
        is_checkpointed=config.gradient_checkpointing,
        loss_chunk_tokens=config.loss_chunk_tokens or LOSS_CHUNK_TOKENS["cuda"],
    )
