"""Where a model's first weights come from."""

from typing import Protocol

import torch
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase

from modeling_gpt2_repro.configuration_gpt2_repro import MODEL_SIZES, GPT2ReproConfig
from modeling_gpt2_repro.errors import UserError
from modeling_gpt2_repro.modeling_gpt2_repro import GPT2ReproForCausalLM

DEFAULT_SIZE = "124M"


class ShapeSettings(Protocol):
    """The settings of a run that decide its model; `None` leaves the shape to `model_size`, or to existing weights."""

    model_size: str | None
    n_layer: int | None
    n_head: int | None
    n_embd: int | None
    sequence_length: int
    dropout: float
    seed: int


def build_model(source: str, settings: ShapeSettings, tokenizer: PreTrainedTokenizerBase) -> GPT2ReproForCausalLM:
    """Build a model in float32 on the CPU: from `scratch` by the seed alone, or from a folder or Hub id.

    Dropout is the settings' in either case, whatever existing weights were trained with.

    Raises:
        UserError: no such model, or one that contradicts the settings or the tokenizer.
    """
    wanted = {name: getattr(settings, name) for name in ("n_layer", "n_head", "n_embd")}
    wanted = {name: value for name, value in wanted.items() if value is not None}
    dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), settings.dropout)
    if source == "scratch":
        shape = {**_get_shape(settings.model_size or DEFAULT_SIZE), **wanted}
        if shape["n_embd"] % shape["n_head"]:
            raise UserError(f"--n_embd {shape['n_embd']} has to be divisible by --n_head {shape['n_head']}")
        eos_token_id = tokenizer.eos_token_id
        torch.manual_seed(settings.seed)
        return GPT2ReproForCausalLM(
            GPT2ReproConfig(
                vocab_size=len(tokenizer),
                n_positions=settings.sequence_length,
                bos_token_id=eos_token_id,
                eos_token_id=eos_token_id,
                **shape,
                **dropouts,
            )
        )

    model = _load_gpt2(source, dropouts)
    if settings.model_size is not None:
        wanted = {**_get_shape(settings.model_size), **wanted}
    for name, value in {**wanted, "vocab_size": len(tokenizer)}.items():
        if getattr(model.config, name) != value:
            asked_by = "the data's tokenizer" if name == "vocab_size" else "the run's --model_size or --" + name
            raise UserError(f"{source} has {name} {getattr(model.config, name)}, but {asked_by} says {value}")
    if settings.sequence_length > model.config.n_positions:
        raise UserError(
            f"--sequence_length {settings.sequence_length} is longer than the {model.config.n_positions} positions of "
            f"{source}"
        )
    return model


def _get_shape(model_size: str) -> dict[str, int]:
    if model_size not in MODEL_SIZES:
        raise UserError(f"unknown --model_size {model_size}: use one of {', '.join(MODEL_SIZES)}")
    return MODEL_SIZES[model_size]


def _load_gpt2(source: str, dropouts: dict[str, float]) -> GPT2ReproForCausalLM:
    """Load a GPT-2-shaped model whole: transformers only warns where it fills a hole with random numbers."""
    try:
        model, loading_info = GPT2ReproForCausalLM.from_pretrained(
            source, dtype=torch.float32, output_loading_info=True, **dropouts
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"cannot load a model from {source}: {error}") from error
    if loading_info["missing_keys"]:
        raise UserError(f"{source} lacks weights that its config.json asks for: {min(loading_info['missing_keys'])}")
    return model
