"""Conversion of karpathy's nanoGPT (`ckpt.pt`), build-nanogpt (`log/model_*.pt`) and llm.c checkpoints."""

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

# Wrappers add a prefix to parameter names: torch.compile, FSDP and activation checkpointing anywhere in the name,
# DistributedDataParallel, DeepSpeed and Lightning only at its start.
WRAPPERS = r"_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module"
WRAPPER_PREFIXES = re.compile(rf"^(({WRAPPERS}|_forward_module|module|model|gpt|net)\.)+|({WRAPPERS})\.")
# Keys under which projects save the weights and the model's shape.
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

    No code in the file is executed. A bare state dict may also be GPT-2's own, with or without the prefix
    `transformer.`, and may be a safetensors file.

    Args:
        tokenizer: the tokenizer of the training data. Embedding rows beyond its ids are padding (50,304 rows for
            GPT-2's 50,257 ids) and are dropped; `None` keeps all rows.
        activation_function: checkpoints do not record it. `auto` infers it from the project: GELU's tanh approximation
            (`gelu_new`) for build-nanogpt and llm.c. nanoGPT used it until commit 594068e7 (May 17, 2023) and exact
            GELU (`gelu`) since; its files count as newer unless their `model_args` lack `bias`, which was added in
            commit e808a671 (January 27, 2023).
        n_head: required for a bare state dict unless its heads are 64 wide, as GPT-2's are.
        report: called with one line per assumption and for dropped rows.

    Raises:
        UserError: the file is damaged or not such a checkpoint, its weights are not a complete GPT-2, or it
            contradicts itself or the arguments.
    """
    content = read_checkpoint_file(Path(path))
    weights = next((content[key] for key in WEIGHTS_KEYS if isinstance(content.get(key), dict)), content)
    if not weights or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise UserError(
            f"{path} contains no weights: neither under `{'`, `'.join(WEIGHTS_KEYS)}` nor as a bare state dict"
        )
    try:
        state_dict = convert_state_dict(weights)
        n_head = _choose_n_head(_measure_shape(state_dict), _find_declared_shape(content), n_head)
        if activation_function == "auto":
            activation_function, reason = _guess_activation(content, weights)
            report(f"assumed activation: {activation_function}, {reason} (override with --activation_function)")
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
    """Convert a state dict to float32 with the names and shapes of `GPT2LMHeadModel` and `GPT2ReproForCausalLM`.

    `nn.Linear` weights (out, in) are transposed to GPT-2's `Conv1D` layout (in, out), unless they already have it;
    missing biases become zeros; causal masks and wrapper prefixes are dropped.

    Raises:
        UserError: weights are missing, unknown or of the wrong shape, or the head is not tied to the token embedding.
    """
    tensors = {name: tensor.float() for name, tensor in _normalize_names(state_dict).items()}
    for name in (WTE, WPE, C_FC):
        if name not in tensors or tensors[name].dim() != 2:
            raise UserError(f"not a GPT-2 state dict: it has no matrix {name}")
    tensors.setdefault(HEAD, tensors[WTE])  # tied, and some files contain only one
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
    """Rename the weights to GPT-2's names, without wrapper prefixes, and drop causal masks."""
    tensors = {WRAPPER_PREFIXES.sub("", name): tensor for name, tensor in state_dict.items()}
    if "wte.weight" in tensors:  # OpenAI's own files
        tensors = {name if name == HEAD else f"transformer.{name}": tensor for name, tensor in tensors.items()}
    return {name: tensor for name, tensor in tensors.items() if not MASK_BUFFER.search(name)}


def _has_conv1d_layout(c_fc: torch.Tensor) -> bool:
    """Return whether matrices are (in, out), which the MLP's first matrix shows because it is not square."""
    return c_fc.shape[0] < c_fc.shape[1]


def _check_tensors(tensors: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Size]) -> None:
    if unknown := sorted(tensors.keys() - expected.keys()):
        raise UserError(f"not a GPT-2 state dict: it has {unknown[0]} (unknown names: {len(unknown)})")
    if missing := sorted(expected.keys() - tensors.keys()):
        raise UserError(f"incomplete GPT-2 state dict: it lacks {missing[0]} (missing names: {len(missing)})")
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise UserError(f"{name} is {tuple(tensors[name].shape)}, but in GPT-2 of this size it is {tuple(shape)}")
    if not torch.equal(tensors[HEAD], tensors[WTE]):
        raise UserError(f"{HEAD} differs from {WTE}: GPT-2, and nanoGPT since January 14, 2023, tie the two")


def _drop_padding_rows(
    state_dict: dict[str, torch.Tensor], n_ids: int, report: Callable[[str], object]
) -> dict[str, torch.Tensor]:
    n_rows = len(state_dict[WTE])
    if n_rows < n_ids:
        raise UserError(
            f"it has embeddings for {n_rows:,} token ids, but the tokenizer has {n_ids:,}: pass the --tokenizer that "
            "it was trained with, or --tokenizer none"
        )
    report(f"dropped embedding rows beyond the tokenizer's {n_ids:,} ids: {n_rows - n_ids}")
    return state_dict | {name: state_dict[name][:n_ids] for name in (WTE, HEAD)}


def _find_declared_shape(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a checkpoint's configuration, with names and types unchecked."""
    found = (content[key] for key in SHAPE_KEYS if isinstance(content.get(key), (dict, SavedConfig)))
    declared: dict[str, Any] | SavedConfig = next(found, {})
    fields = vars(declared) if isinstance(declared, SavedConfig) else declared
    return {name: value for name, value in fields.items() if not isinstance(value, IgnoredValue | None)}


def _measure_shape(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    (vocab_size, n_embd), n_positions = tensors[WTE].shape, len(tensors[WPE])
    n_layer = len({name.split(".")[2] for name in tensors if name.startswith("transformer.h.")})
    return {"vocab_size": vocab_size, "n_positions": n_positions, "n_embd": n_embd, "n_layer": n_layer}


def _choose_n_head(shape: dict[str, int], declared: dict[str, Any], requested: int | None) -> int:
    """Return the number of heads, which weights do not reveal, and check a declared shape against the measured one."""
    measured = {**shape, "block_size": shape["n_positions"]}
    for name in measured.keys() & declared.keys():
        if declared[name] != measured[name]:
            raise UserError(f"its configuration has {name} {declared[name]}, but its weights have {measured[name]}")
    n_embd, saved = shape["n_embd"], declared.get("n_head")
    if requested is not None and saved not in (None, requested):
        raise UserError(f"--n_head {requested} contradicts its configuration, which has n_head {saved}")
    n_head = saved if requested is None else requested
    if n_head is None:
        if n_embd % 64:
            raise UserError(f"cannot infer n_head from n_embd {n_embd}, which is not a multiple of 64: add --n_head")
        n_head = n_embd // 64
    if type(n_head) is not int or n_head < 1 or n_embd % n_head:
        raise UserError(f"n_embd {n_embd} is not divisible by n_head {n_head}")
    return n_head


def _guess_activation(content: Mapping[str, Any], weights: Mapping[str, torch.Tensor]) -> tuple[Activation, str]:
    """Return the activation function and the reason: the first match decides which project wrote the file."""
    model_args = content.get("model_args")
    is_nanogpt = isinstance(model_args, dict)
    evidence = (
        (content.get("format") == FORMAT, "gelu_new", "llm.c's"),
        (isinstance(content.get("config"), SavedConfig), "gelu_new", "build-nanogpt's"),
        (is_nanogpt and "bias" not in model_args, "gelu_new", "nanoGPT's before January 27, 2023"),
        (is_nanogpt, "gelu", "nanoGPT's since May 17, 2023"),
        (_has_conv1d_layout(_normalize_names(weights)[C_FC]), "gelu_new", "GPT-2's, because the file has its layout"),
        # nanoGPT saves causal masks only if torch lacks fused attention, build-nanogpt always.
        (any(map(MASK_BUFFER.search, weights)), "gelu_new", "build-nanogpt's, because the file has causal masks"),
        (True, "gelu", "nanoGPT's since May 17, 2023, because the file has no causal masks"),
    )
    return next((activation, reason) for is_found, activation, reason in evidence if is_found)
