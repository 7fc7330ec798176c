"""Loading any causal language model for evaluation, with its mistakes explained."""

from pathlib import Path

import torch
from huggingface_hub.utils import logging as hub_logging
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from modeling_gpt2_repro.errors import UserError
from modeling_gpt2_repro.files import check_weight_names


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


def check_token_ids(model: PreTrainedModel, largest_id: int, name: str, flag: str = "--model") -> None:
    """Check that a model has a row for every id up to the largest that it is given.

    Some tokenizers have more ids than their model has rows, and no text makes them: what counts is what a text makes.

    Args:
        name, flag: as for `load_causal_lm`.

    Raises:
        UserError: it has not.
    """
    n_rows = model.get_input_embeddings().num_embeddings
    if largest_id >= n_rows:
        raise UserError(
            f"{flag} {name} has embeddings for {n_rows} token ids, but its tokenizer makes id {largest_id} of the "
            "text: put the tokenizer that the model was trained with into the folder"
        )


def silence_libraries() -> None:
    """Keep stderr for the progress bar and for the one line of a user's error."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    hub_logging.set_verbosity_error()


def _load_model(name: str, dtype: torch.dtype, trust_remote_code: bool, flag: str) -> PreTrainedModel:
    if list(Path(name).glob("pytorch_model*.bin")) and not list(Path(name).glob("*.safetensors")):
        raise UserError(
            f"{flag} {name} holds its weights as a pickle, which may run anything when opened, and is not opened "
            "here: load it with from_pretrained where you trust it, and let save_pretrained write model.safetensors"
        )
    try:
        check_weight_names(name)
        model, loading_info = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            use_safetensors=True,
        )
    except Exception as error:  # of a damaged folder transformers raises anything
        raise UserError(f"{flag} {name} is not a causal language model that loads: {_explain(error)}") from error
    # transformers fills both kinds with random numbers and only warns.
    unloaded = sorted(loading_info["missing_keys"]) + sorted(key for key, *_ in loading_info["mismatched_keys"])
    if unloaded:
        raise UserError(
            f"{flag} {name} lacks {len(unloaded)} weights of the shape that its config.json asks for, such as "
            f"{unloaded[0]}: the two do not belong together"
        )
    return model


def _load_tokenizer(name: str, trust_remote_code: bool, flag: str) -> PreTrainedTokenizerBase:
    if name.startswith((".", "/", "~")) and not Path(name).is_dir():
        raise UserError(f"{flag} {name} does not exist: pass a model folder or a Hub id")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:  # of a damaged folder transformers raises anything
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
    return next(iter(str(error).splitlines()), type(error).__name__)
