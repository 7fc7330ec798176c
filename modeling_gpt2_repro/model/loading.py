"""Loading any causal language model for evaluation, with its mistakes explained."""

import re
import sys
from pathlib import Path

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

from modeling_gpt2_repro.core.errors import UserError, raise_if_refused
from modeling_gpt2_repro.model.folder import check_model_folder, check_weight_names

# Heads that are not a vocabulary's: where the embeddings are tied, all weights of a language model lie beside them.
OTHER_HEAD = re.compile(r"For\w*(Classification|QuestionAnswering|MultipleChoice|Prediction|RewardModel)$")


def load_causal_lm(
    name: str, dtype: torch.dtype = torch.float32, trust_remote_code: bool = False, flag: str = "--model"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model, in evaluation mode on the CPU, and its tokenizer from a folder or a Hub id.

    Args:
        flag: by which the user gave the name, for the messages of errors.

    Raises:
        UserError: either is missing or broken.
    """
    tokenizer = _load_tokenizer(name, trust_remote_code, flag)
    return _load_model(name, dtype, trust_remote_code, flag), tokenizer


def _load_model(name: str, dtype: torch.dtype, trust_remote_code: bool, flag: str) -> PreTrainedModel:
    if list(Path(name).glob("pytorch_model*.bin")) and not list(Path(name).glob("*.safetensors")):
        raise UserError(
            f"{flag} {name} holds its weights as a pickle, which may run anything when opened, and is not opened "
            "here: load it with from_pretrained where you trust it, and let save_pretrained write model.safetensors"
        )
    try:
        check_weight_names(name)
        declared = _check_kind(AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code))
        model, loading_info = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            use_safetensors=True,
        )
    except Exception as error:  # of a damaged folder transformers raises anything
        raise_if_refused(error, name)
        raise UserError(f"{flag} {name} did not load as a causal language model: {_explain(error)}") from error
    # transformers fills both kinds with random numbers and only warns.
    unloaded = sorted(loading_info["missing_keys"]) + sorted(key for key, *_ in loading_info["mismatched_keys"])
    if unloaded:
        loaded = type(model).__name__
        reason = "the two do not belong together" if declared == loaded else f"they are of {declared}, not of {loaded}"
        raise UserError(
            f"{flag} {name} lacks {len(unloaded)} weights of the shape that its config.json asks for, such as "
            f"{unloaded[0]}: {reason}"
        )
    return model


def _check_kind(config: PreTrainedConfig) -> str:
    """Return the class that a model was saved as.

    Raises:
        UserError: another task's, whose weights transformers may all the same put into a language model.
    """
    declared = (config.architectures or [config.model_type])[0]
    has_class = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or "AutoModelForCausalLM" in getattr(
        config, "auto_map", {}
    )
    is_translator = config.is_encoder_decoder and not declared.endswith("ForCausalLM")
    if OTHER_HEAD.search(declared) or is_translator or not has_class:
        raise UserError(f"its config.json names the class {declared}")
    return declared


def _load_tokenizer(name: str, trust_remote_code: bool, flag: str) -> PreTrainedTokenizerBase:
    if name.startswith((".", "/", "~")) and not Path(name).exists():
        raise UserError(f"{flag} {name} does not exist: pass a model folder or a Hub id")
    try:
        check_model_folder(name)
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:  # of a damaged folder transformers raises anything
        raise_if_refused(error, name)
        raise UserError(
            f"cannot load a model and its tokenizer from {flag} {name}; pass a model folder or a Hub id: "
            f"{_explain(error)}"
        ) from error
    # From a folder without tokenizer files, transformers builds one of special tokens only.
    if not tokenizer("HellaSwag")["input_ids"]:
        raise UserError(f"{flag} {name} has no tokenizer: save the one that the model was trained with beside it")
    return tokenizer


def _explain(error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return "it comes with code of its own, which runs only where --trust_remote_code is given"
    if sys.flags.optimize > 1 and "docstring" in str(error):
        return "transformers reads docstrings, which python -OO removes: run it without -OO (PYTHONOPTIMIZE)"
    place = getattr(error, "filename", None)
    if place and (str(place).startswith(HF_MODULES_CACHE) or HF_MODULES_CACHE.startswith(str(place))):
        return f"{error}: set HF_MODULES_CACHE to a folder that you may write to, for the code that comes with it"
    return next(iter(str(error).splitlines()), type(error).__name__)
