"""Loading any causal language model for evaluation, with its mistakes explained."""

import re
import sys
from pathlib import Path

import torch
from huggingface_hub.utils import logging as hub_logging
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
from transformers.utils import logging as transformers_logging

from modeling_gpt2_repro.core.errors import UserError, raise_if_refused
from modeling_gpt2_repro.model.folder import check_model_folder, check_weight_names

# Heads that are not a vocabulary's: where the embeddings are tied, all weights of a language model lie beside them.
OTHER_HEAD = re.compile(r"For\w*(Classification|QuestionAnswering|MultipleChoice|Prediction|RewardModel)$")
PROBE_TOKENS = 8
# What may come from later tokens of a causal model. As a share of the greatest gradient: of all that transformers has,
# the causal ones have 0, the others 0.001 and more with random weights.
LARGEST_FUTURE_GRADIENT = 1e-5
# As a share of the greatest logit: 13 rounding steps of bfloat16.
LARGEST_LOGIT_CHANGE = 0.05


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


def check_causal(model: PreTrainedModel, name: str, flag: str = "--model") -> None:
    """Check that a model predicts each token from earlier ones alone. Call it where the model's kernels run.

    Args:
        name, flag: as for `load_causal_lm`.

    Raises:
        UserError: it reads ahead, as BERT does, so that what it says is no probability of a text; or it does not run.
    """
    try:
        is_causal = not reads_ahead(model)
    except RuntimeError as error:  # such as XLNet in bfloat16
        raise UserError(f"{flag} {name} loads, but does not run: {_explain(error)}") from error
    if not is_causal:
        raise UserError(
            f"{flag} {name} is not causal: {type(model).__name__} lets the prediction of a token see that token and "
            "later ones, so that it is no probability of the text; give a model trained to predict the next token"
        )


def reads_ahead(model: PreTrainedModel) -> bool:
    """Tell whether a model's logits depend on later tokens: by the gradient of early logits to late embeddings.

    A gradient is 0 behind a causal mask in any precision. The logits of two texts that begin alike need not be equal:
    where experts gather tokens, the order of sums changes, in bfloat16 by as much as an untrained BERT's read from
    the future. So they are compared, coarsely, only of a model that autograd does not pass: some kernels for quantized
    weights have no backward.
    """
    n_rows, n_positions = model.get_input_embeddings().num_embeddings, get_max_positions(model)
    length = min(PROBE_TOKENS, max(1, (n_positions or PROBE_TOKENS * 2) // 2))  # RoBERTa has two positions less
    half = length // 2
    # Not the ends of the vocabulary, where padding and other special tokens are.
    ids = (2 * torch.arange(length, device=model.device)[None] + 1) * n_rows // (2 * length)
    try:
        gradient = _differentiate_first_half(model, ids)
    except (RuntimeError, IndexError):  # no gradient, or an embedding that is not called
        other = torch.cat([ids[:, :half], ids[:, half:].flip(1)], dim=1)
        with torch.no_grad():
            one, two = (model(input_ids=each, use_cache=False).logits[:, :half].float() for each in (ids, other))
        return bool(((one - two).abs() > LARGEST_LOGIT_CHANGE * one.abs().max()).any())
    return bool((gradient[half:].abs() > LARGEST_FUTURE_GRADIENT * gradient.abs().max()).any())


def _differentiate_first_half(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Return the gradient of a loss on the first half of the places to all embeddings, (length, width)."""
    embeddings = []

    def replace(_: torch.nn.Module, __: tuple, output: torch.Tensor) -> torch.Tensor:
        embeddings.append(output.detach().requires_grad_())
        return embeddings[-1].clone()  # which the model may change in place

    with torch.enable_grad(), model.get_input_embeddings().register_forward_hook(replace):
        logits = model(input_ids=ids, use_cache=False).logits[:, : ids.shape[1] // 2]
        (gradient,) = torch.autograd.grad(logits.float().log_softmax(-1)[..., 0].sum(), embeddings[0])
    return gradient.reshape(ids.shape[1], -1)  # XLNet's has the length first


def get_max_positions(model: torch.nn.Module) -> int | None:
    """Return how many tokens the model can attend to, or `None` where its configuration sets no limit."""
    n_positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return None if n_positions == -1 else n_positions  # XLNet's word for no limit


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
