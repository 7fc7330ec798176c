"""Strict loading of causal language models from a folder or the Hub.

transformers fills missing weights with random numbers and only warns, opens pickles, which can run code, and follows
paths out of the model's folder. `load_model` rejects all three, for any model class.
"""

import contextlib
import re
from collections.abc import Generator
from pathlib import Path
from typing import Any, TypeVar, overload

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import HF_MODULES_CACHE

from ..core.errors import UserError, raise_if_unreadable
from .causality import check_causal
from .folder import check_model_folder

Model = TypeVar("Model", bound=PreTrainedModel)

# Classes for other tasks. With tied embeddings, their checkpoints have all weights of a language model plus a head.
OTHER_HEAD = re.compile(r"For\w*(Classification|QuestionAnswering|MultipleChoice|Prediction|RewardModel)$")


def load_causal_lm(
    name: str,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
    flag: str = "--model",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load any causal language model, in evaluation mode, and its tokenizer from a folder or a Hub id.

    Args:
        flag: the flag that set `name`, for error messages.

    Raises:
        UserError: the model or its tokenizer is missing or broken, the model was saved for another task, or it is not
            causal.
    """
    with explained_loading(name, flag) as subject:
        tokenizer: Any = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
        _check_task(AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code))
    # Without tokenizer files, transformers builds a tokenizer that has only special tokens.
    if not tokenizer("HellaSwag")["input_ids"]:
        raise UserError(f"{subject} has no tokenizer: add the one that the model was trained with to its folder")
    model = load_model(AutoModelForCausalLM, name, flag=flag, dtype=dtype, trust_remote_code=trust_remote_code)
    model.to(device)
    check_causal(model, name, flag)
    return model, tokenizer


@overload
def load_model(model_class: type[Model], name: str, *, flag: str = "", **options: Any) -> Model: ...


@overload
def load_model(
    model_class: type[AutoModelForCausalLM], name: str, *, flag: str = "", **options: Any
) -> PreTrainedModel: ...


def load_model(model_class: Any, name: str, *, flag: str = "", **options: Any) -> Any:
    """Load all weights of a model, in evaluation mode on the CPU.

    Args:
        model_class: our class, or an Auto class.
        name: a model folder or a Hub id.
        flag: the flag that set `name`, for error messages; empty if none did.
        options: passed to `from_pretrained`.

    Raises:
        UserError: the model is missing, damaged, pickled or of another class, or a weight is missing or does not have
            the shape that its config.json implies.
    """
    with explained_loading(name, flag) as subject:
        model, loading_info = model_class.from_pretrained(
            name, output_loading_info=True, ignore_mismatched_sizes=True, use_safetensors=True, **options
        )
    unloaded = sorted(loading_info["missing_keys"]) + sorted(key for key, *_ in loading_info["mismatched_keys"])
    if unloaded:
        raise UserError(
            f"{subject}: weights that its config.json requires are missing or have another shape, such as "
            f"{unloaded[0]} ({len(unloaded)} in total): config.json declares {_get_saved_class(model.config)}, loaded "
            f"as {type(model).__name__}"
        )
    return model


@contextlib.contextmanager
def explained_loading(name: str, flag: str = "") -> Generator[str]:
    """Check a model folder before transformers reads it, and turn any exception in the context into a `UserError`.

    Args:
        name, flag: as in `load_model`.

    Yields:
        What to call the model in error messages.
    """
    subject = f"{flag} {name}".strip()
    if name.startswith((".", "/", "~")) and not Path(name).exists():
        raise UserError(f"{subject} does not exist: pass a model folder or a Hub id")
    try:
        check_model_folder(name)
        yield subject
    except Exception as error:  # for a damaged folder, transformers can raise any type
        raise_if_unreadable(error, name)
        raise UserError(f"cannot load a model from {subject}: {_explain(error)}") from error


def _check_task(config: PreTrainedConfig) -> None:
    """Check that a model was saved as a causal language model; transformers would load others as one regardless.

    Raises:
        ValueError: the model was saved for another task.
    """
    saved_class = _get_saved_class(config)
    auto_map = getattr(config, "auto_map", {})
    has_class = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or "AutoModelForCausalLM" in auto_map
    is_translator = config.is_encoder_decoder and not saved_class.endswith("ForCausalLM")
    if OTHER_HEAD.search(saved_class) or is_translator or not has_class:
        raise ValueError(f"its config.json declares {saved_class}, which is not a causal language model")


def _get_saved_class(config: PreTrainedConfig) -> str:
    return (config.architectures or [config.model_type])[0]


def _explain(error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return "it includes its own model code, which runs only with --trust_remote_code"
    place = getattr(error, "filename", None)
    if place and (str(place).startswith(HF_MODULES_CACHE) or HF_MODULES_CACHE.startswith(str(place))):
        return f"{error}: set HF_MODULES_CACHE to a writable folder, where transformers can cache the model's code"
    return next(iter(str(error).splitlines()), type(error).__name__)
