"""The model of a run: its shape and its initial weights."""

from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..configuration_gpt2_repro import MODEL_SIZES, GPT2ReproConfig
from ..core.devices import measure_total_memory
from ..core.errors import UserError
from ..model.limits import check_sequence_length
from ..model.loading import explained_loading, load_model
from ..modeling_gpt2_repro import GPT2ReproForCausalLM
from .config import TrainingConfig

SHAPE = ("n_layer", "n_head", "n_embd")


def build_model(source: str, config: TrainingConfig, tokenizer: PreTrainedTokenizerBase) -> GPT2ReproForCausalLM:
    """Build a model in float32 on the CPU.

    Args:
        source: `scratch` for weights drawn from the seed, or a folder or Hub id. Dropout comes from `config` either
            way.

    Raises:
        UserError: the model cannot be loaded, or contradicts the config or the tokenizer.
    """
    if source == "scratch":
        model_config = _build_config(config, len(tokenizer), tokenizer.eos_token_id)
        _check_memory(model_config)
        torch.manual_seed(config.seed)
        return GPT2ReproForCausalLM(model_config)

    _check_memory(_load_config(source))
    model = load_model(GPT2ReproForCausalLM, source, dtype=torch.float32, **_get_dropouts(config))
    for name, value in {**resolve_shape(config), "vocab_size": len(tokenizer)}.items():
        if getattr(model.config, name) != value:
            origin = "the data's tokenizer" if name == "vocab_size" else "the run's --model_size or --" + name
            raise UserError(f"{source} has {name} {getattr(model.config, name)}, but {origin} requires {value}")
    check_sequence_length(model, config.sequence_length, source)
    return model


def resolve_shape(config: TrainingConfig) -> dict[str, Any]:
    """Return `n_layer`, `n_head` and `n_embd` as far as the config sets them; for existing weights perhaps none.

    Raises:
        UserError: an unknown `model_size`.
    """
    size = config.model_size or ("124M" if config.init_from == "scratch" else None)
    if size is not None and size not in MODEL_SIZES:
        raise UserError(f"unknown --model_size {size}: use one of {', '.join(MODEL_SIZES)}")
    given = {name: getattr(config, name) for name in SHAPE if getattr(config, name) is not None}
    return (MODEL_SIZES[size] if size is not None else {}) | given


def load_shape(source: str) -> dict[str, int]:
    """Return `n_layer`, `n_head` and `n_embd` of a model in a folder or on the Hub.

    Raises:
        UserError: its configuration cannot be read.
    """
    model_config = _load_config(source)
    return {name: getattr(model_config, name) for name in SHAPE}


def build_skeleton(config: TrainingConfig, vocab_size: int) -> GPT2ReproForCausalLM:
    """Build a run's model on the meta device, to count its parameters.

    Raises:
        UserError: the shape is invalid, or `init_from` has no configuration.
    """
    is_fresh = config.init_from == "scratch"
    model_config = _build_config(config, vocab_size, None) if is_fresh else _load_config(config.init_from)
    with torch.device("meta"):
        return GPT2ReproForCausalLM(model_config)


def _build_config(config: TrainingConfig, vocab_size: int, eos_token_id: int | None) -> GPT2ReproConfig:
    shape = resolve_shape(config)
    if shape["n_embd"] % shape["n_head"]:
        raise UserError(f"--n_embd {shape['n_embd']} must be divisible by --n_head {shape['n_head']}")
    return GPT2ReproConfig(
        vocab_size=vocab_size,
        n_positions=config.sequence_length,
        bos_token_id=eos_token_id,
        eos_token_id=eos_token_id,
        **shape,
        **_get_dropouts(config),
    )


def _check_memory(model_config: GPT2ReproConfig) -> None:
    """Raise a `UserError` if the weights exceed the machine's memory: allocating them would get processes killed."""
    n_embd, n_rows = model_config.n_embd, model_config.vocab_size + model_config.n_positions
    matrices = 12 * model_config.n_layer * n_embd**2 + n_rows * n_embd
    memory = measure_total_memory()
    if 4 * matrices > memory:
        raise UserError(
            f"a model of {matrices:,} parameters takes {4 * matrices / 1e9:,.1f} GB, and this machine has "
            f"{memory / 1e9:,.1f} GB: use a smaller --model_size, --n_layer, --n_embd or --sequence_length"
        )


def _get_dropouts(config: TrainingConfig) -> dict[str, Any]:
    return dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout)


def _load_config(source: str) -> GPT2ReproConfig:
    with explained_loading(source):
        return GPT2ReproConfig.from_pretrained(source)
