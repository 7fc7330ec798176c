"""Checkpoints of karpathy/nanoGPT (`ckpt.pt`), build-nanogpt (`log/model_*.pt`) and llm.c, converted to our model."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerBase

from ..configuration_gpt2_repro import GPT2ReproConfig
from ..core.errors import UserError
from ..modeling_gpt2_repro import GPT2ReproForCausalLM
from .convert_llmc import FORMAT
from .torch_file import IgnoredValue, SavedConfig, read_checkpoint_file

Activation = Literal["auto", "gelu", "gelu_new"]

# Prefixes of wrappers: of torch.compile, FSDP and activation checkpointing anywhere in a name; of
# DistributedDataParallel, DeepSpeed and Lightning in front of it.
WRAPPERS = r"_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module"
WRAPPER_PREFIXES = re.compile(rf"^(({WRAPPERS}|_forward_module|module|model|gpt|net)\.)+|({WRAPPERS})\.")
# Keys of a checkpoint that projects keep the weights and the model's shape under.
WEIGHTS_KEYS = ("model", "state_dict", "model_state_dict", "module", "weights")
SHAPE_KEYS = ("model_args", "config", "model_config", "hyper_parameters", "args")
MASK_BUFFER = re.compile(r"\.attn\.(masked_)?bias$")
LINEAR_WEIGHTS = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
WTE, WPE, HEAD = "transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight"
C_FC = "transformer.h.0.mlp.c_fc.weight"


def load_nanogpt(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    activation_function: Activation = "auto",
    n_head: int | None = None,
    report: Callable[[str], object] = lambda line: None,
) -> GPT2ReproForCausalLM:
    """Load a checkpoint of nanoGPT, build-nanogpt or llm.c, or a bare state dict, in float32 and evaluation mode.

    No code in the file is run. A state dict may be GPT-2's own, with or without `transformer.` in front of its names,
    and in a safetensors file.

    Args:
        tokenizer: of the training data. Embedding rows beyond its ids are padding (50,304 rows for GPT-2's 50,257 ids)
            and dropped; `None` keeps all.
        activation_function: no file names it. `auto` chooses by project: GELU's tanh approximation (`gelu_new`) for
            build-nanogpt and llm.c. nanoGPT used it until commit 594068e7 (17 May 2023) and exact GELU (`gelu`) since;
            its files count as newer unless their `model_args` lack the `bias` of commit e808a671 (27 January 2023).
        n_head: needed for a bare state dict whose heads are not 64 wide, as GPT-2's are.
        report: called with a line about each assumption and about what was dropped.

    Raises:
        UserError: the file is no such checkpoint or damaged, its weights are not a whole GPT-2's, or it contradicts
            itself or the arguments.
    """
    content = read_checkpoint_file(Path(path))
    weights = next((content[key] for key in WEIGHTS_KEYS if isinstance(content.get(key), dict)), content)
    if not weights or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise UserError(
            f"{path} has no weights: neither under `{'`, `'.join(WEIGHTS_KEYS)}` nor as a state dict alone"
        )
    try:
        state_dict = convert_state_dict(weights)
        n_head = _choose_n_head(_measure_shape(state_dict), _find_declared_shape(content), n_head)
        if activation_function == "auto":
            activation_function, reason = _guess_activation(content, weights)
            report(f"activation taken: {activation_function}, {reason} (override with --activation_function)")
        if tokenizer is not None:
            state_dict = _drop_padding_rows(state_dict, len(tokenizer), report)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error

    eos_token_id = tokenizer.eos_token_id if tokenizer is not None else None
    config = GPT2ReproConfig(
        n_head=n_head,
        activation_function=activation_function,
        bos_token_id=eos_token_id,
        eos_token_id=eos_token_id,
        **_measure_shape(state_dict),
    )
    model = GPT2ReproForCausalLM(config)
    model.load_state_dict(state_dict)
    return model.eval()


def convert_state_dict(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a state dict in float32, as `GPT2LMHeadModel` and our class have it, that computes the same function.

    `nn.Linear` weights (out, in) are transposed to GPT-2's `Conv1D` (in, out), unless they have that form already; a
    model without biases gets zeros; causal masks and the prefixes of wrappers are dropped.

    Raises:
        UserError: weights are missing, unknown or of a wrong shape, or the head is not the token embedding.
    """
    tensors = {name: tensor.float() for name, tensor in _normalize_names(state_dict).items()}
    for name in (WTE, WPE, C_FC):
        if name not in tensors or tensors[name].dim() != 2:
            raise UserError(f"no GPT-2 state dict: it has no matrix {name}")
    tensors.setdefault(HEAD, tensors[WTE])  # the two are tied, and some files hold only one
    with torch.device("meta"):
        model = GPT2ReproForCausalLM(GPT2ReproConfig(n_head=1, **_measure_shape(tensors)))
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    transposed = set()
    if not _has_conv1d_layout(tensors[C_FC]):
        transposed = {name for name in expected if name.endswith(LINEAR_WEIGHTS)}
        expected |= {name: expected[name][::-1] for name in transposed}
    if not any(name.endswith(".bias") for name in tensors):
        tensors |= {name: torch.zeros(shape) for name, shape in expected.items() if name.endswith(".bias")}
    _check_tensors(tensors, expected)
    return {name: tensors[name].t().contiguous() if name in transposed else tensors[name] for name in expected}


def _normalize_names(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights under GPT-2's names, without prefixes of wrappers and without causal masks."""
    tensors = {WRAPPER_PREFIXES.sub("", name): tensor for name, tensor in state_dict.items()}
    if "wte.weight" in tensors:  # as in OpenAI's own files
        tensors = {name if name == HEAD else f"transformer.{name}": tensor for name, tensor in tensors.items()}
    return {name: tensor for name, tensor in tensors.items() if not MASK_BUFFER.search(name)}


def _has_conv1d_layout(c_fc: torch.Tensor) -> bool:
    """Return whether matrices are (in, out): the MLP's first shows it, as the attention's projection is square."""
    return c_fc.shape[0] < c_fc.shape[1]


def _check_tensors(tensors: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Size]) -> None:
    if unknown := sorted(tensors.keys() - expected.keys()):
        raise UserError(f"no GPT-2 state dict: it has {unknown[0]} (unknown names: {len(unknown)})")
    if missing := sorted(expected.keys() - tensors.keys()):
        raise UserError(f"no whole GPT-2 state dict: it lacks {missing[0]} (missing names: {len(missing)})")
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise UserError(f"{name} is {tuple(tensors[name].shape)}, where GPT-2 of this size has {tuple(shape)}")
    if not torch.equal(tensors[HEAD], tensors[WTE]):
        raise UserError(f"{HEAD} differs from {WTE}: in GPT-2, and in nanoGPT since 14 January 2023, they are one")


def _drop_padding_rows(
    state_dict: dict[str, torch.Tensor], n_ids: int, report: Callable[[str], object]
) -> dict[str, torch.Tensor]:
    n_rows = len(state_dict[WTE])
    if n_rows < n_ids:
        raise UserError(
            f"it has embeddings for {n_rows:,} token ids, but the tokenizer has {n_ids:,}: give the --tokenizer that "
            "it was trained with, or --tokenizer none"
        )
    report(f"embedding rows beyond the tokenizer's {n_ids:,} ids, dropped: {n_rows - n_ids}")
    return state_dict | {name: state_dict[name][:n_ids] for name in (WTE, HEAD)}


def _find_declared_shape(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a checkpoint's configuration, whose names and types are not checked."""
    found = (content[key] for key in SHAPE_KEYS if isinstance(content.get(key), dict | SavedConfig))
    declared = next(found, {})
    fields = vars(declared) if isinstance(declared, SavedConfig) else declared
    return {name: value for name, value in fields.items() if not isinstance(value, IgnoredValue | None)}


def _measure_shape(tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    (vocab_size, n_embd), n_positions = tensors[WTE].shape, len(tensors[WPE])
    n_layer = len({name.split(".")[2] for name in tensors if name.startswith("transformer.h.")})
    return {"vocab_size": vocab_size, "n_positions": n_positions, "n_embd": n_embd, "n_layer": n_layer}


def _choose_n_head(shape: dict[str, int], declared: dict[str, Any], asked: int | None) -> int:
    """Return the number of heads, which weights do not show, and check the rest of a declared shape against them."""
    measured = {**shape, "block_size": shape["n_positions"]}
    for name in measured.keys() & declared.keys():
        if declared[name] != measured[name]:
            raise UserError(f"its configuration says {name} {declared[name]}, but its weights have {measured[name]}")
    n_embd, saved = shape["n_embd"], declared.get("n_head")
    if asked is not None and saved not in (None, asked):
        raise UserError(f"its configuration says n_head {saved}, which --n_head {asked} contradicts")
    n_head = saved if asked is None else asked
    if n_head is None:
        if n_embd % 64:
            raise UserError(f"its weights do not show the heads, and a width of {n_embd} is not GPT-2's: add --n_head")
        n_head = n_embd // 64
    if type(n_head) is not int or n_head < 1 or n_embd % n_head:
        raise UserError(f"a width of {n_embd} cannot be divided among {n_head} heads")
    return n_head


def _guess_activation(content: Mapping[str, Any], weights: Mapping[str, torch.Tensor]) -> tuple[str, str]:
    """Return the activation function and the reason for it: the first evidence of the project that wrote the file."""
    model_args = content.get("model_args")
    is_nanogpt = isinstance(model_args, dict)
    evidence = (
        (content.get("format") == FORMAT, "gelu_new", "llm.c's"),
        (isinstance(content.get("config"), SavedConfig), "gelu_new", "build-nanogpt's"),
        (is_nanogpt and "bias" not in model_args, "gelu_new", "nanoGPT's before 27 January 2023"),
        (is_nanogpt, "gelu", "nanoGPT's since 17 May 2023"),
        (_has_conv1d_layout(_normalize_names(weights)[C_FC]), "gelu_new", "GPT-2's, as the file has its layout"),
        # nanoGPT saves causal masks only if torch lacks fused attention, build-nanogpt always.
        (any(map(MASK_BUFFER.search, weights)), "gelu_new", "build-nanogpt's, as the file has causal masks"),
        (True, "gelu", "nanoGPT's since 17 May 2023, as the file has no causal masks"),
    )
    return next((activation, reason) for is_found, activation, reason in evidence if is_found)
