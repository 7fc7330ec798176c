"""Checkpoints of karpathy/nanoGPT (`ckpt.pt`), build-nanogpt (`log/model_*.pt`) and llm.c as models of ours."""

import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from transformers import PreTrainedTokenizerBase

from modeling_gpt2_repro.configuration_gpt2_repro import GPT2ReproConfig
from modeling_gpt2_repro.core.errors import UserError, raise_if_refused
from modeling_gpt2_repro.core.file_kinds import LLMC_MODEL, SAFETENSORS, ZIP, describe_content
from modeling_gpt2_repro.model.convert_llmc import FORMAT, read_llmc_model
from modeling_gpt2_repro.modeling_gpt2_repro import GPT2ReproForCausalLM

Activation = Literal["auto", "gelu", "gelu_new"]

# Of torch.compile, FSDP and activation checkpointing, which stand anywhere in a name; and of DistributedDataParallel,
# DeepSpeed and Lightning, in front of it.
WRAPPERS = r"_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module"
WRAPPER_PREFIXES = re.compile(rf"^(({WRAPPERS}|_forward_module|module|model|gpt|net)\.)+|({WRAPPERS})\.")
# Where people put the weights, and what says the shape.
WEIGHTS_KEYS = ("model", "state_dict", "model_state_dict", "module", "weights")
SHAPE_KEYS = ("model_args", "config", "model_config", "hyper_parameters", "args")
MASK_BUFFER = re.compile(r"\.attn\.(masked_)?bias$")
LINEAR_WEIGHTS = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
TRUNK = "transformer."
WTE, WPE, HEAD = "transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight"
C_FC = "transformer.h.0.mlp.c_fc.weight"
# Classes of settings, by what they are called; and values that no model needs. Neither is looked up.
SETTINGS_CLASS = re.compile(r"(\w+\.)+(Simple)?\w*(Config|Args|Arguments|Namespace|Settings|HParams|Options)")
SKIPPED_CLASS = re.compile(
    r"(numpy|pathlib|datetime|decimal|uuid)\.[\w.]+"
    r"|builtins\.(bool|bytes|complex|dict|Ellipsis|float|frozenset|int|list|range|set|slice|str|tuple)"
)


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
            and left out; `None` keeps all.
        activation_function: no file names it; `auto` goes by the project. build-nanogpt has GELU's tanh approximation
            (`gelu_new`). So had nanoGPT until its commit 594068e7 (17 May 2023), and exact GELU (`gelu`) since: its
            files are taken for newer, unless their `model_args` lack the `bias` of commit e808a671 (27 January 2023).
        n_head: needed for a bare state dict whose heads are not 64 wide, as GPT-2's are.
        report: called with a line on what was taken for granted and one on what was left out.

    Raises:
        UserError: not such a file, no GPT-2 in it, or one that contradicts itself or the arguments.
    """
    content = _read_file(Path(path))
    weights = next((content[key] for key in WEIGHTS_KEYS if isinstance(content.get(key), dict)), content)
    if not weights or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise UserError(
            f"{path} has no weights: neither under `{'`, `'.join(WEIGHTS_KEYS)}` nor as a state dict alone"
        )
    declared = next((content[key] for key in SHAPE_KEYS if isinstance(content.get(key), dict | _SavedSettings)), {})
    declared = vars(declared) if isinstance(declared, _SavedSettings) else declared
    declared = {name: value for name, value in declared.items() if not isinstance(value, _Skipped | None)}
    try:
        state_dict = convert_state_dict(weights)
        n_head = _choose_n_head(_measure_shape(state_dict), declared, n_head)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    if activation_function == "auto":
        activation_function, reason = _guess_activation(content, weights)
        report(f"activation taken: {activation_function}, {reason} (--activation_function to say otherwise)")

    eos_token_id = None
    if tokenizer is not None:
        n_rows, n_ids, eos_token_id = len(state_dict[WTE]), len(tokenizer), tokenizer.eos_token_id
        if n_rows < n_ids:
            raise UserError(
                f"{path} has embeddings for {n_rows:,} token ids, but the tokenizer has {n_ids:,}: give the "
                "--tokenizer that it was trained with, or --tokenizer none"
            )
        state_dict |= {name: state_dict[name][:n_ids] for name in (WTE, HEAD)}
        report(f"embedding rows beyond the tokenizer's {n_ids:,} ids, dropped: {n_rows - n_ids}")
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
    """Return the state dict, in float32, that `GPT2LMHeadModel` and our class have for the same function.

    `nn.Linear` weights (out, in) are transposed to GPT-2's `Conv1D` (in, out), in which a dict may also be already;
    a model without any bias gets zeros; causal masks and the prefixes of wrappers are left out.

    Raises:
        UserError: weights that are missing, unknown or of a wrong shape, or a head that is not the token embedding.
    """
    tensors = {WRAPPER_PREFIXES.sub("", name): tensor for name, tensor in state_dict.items()}
    if WTE.removeprefix(TRUNK) in tensors:  # as in OpenAI's own files
        tensors = {name if name == HEAD else TRUNK + name: tensor for name, tensor in tensors.items()}
    tensors = {name: tensor.float() for name, tensor in tensors.items() if not MASK_BUFFER.search(name)}
    for name in (WTE, WPE, C_FC):
        if name not in tensors or tensors[name].dim() != 2:
            raise UserError(f"no GPT-2 state dict: it has no matrix {name}")
    tensors.setdefault(HEAD, tensors[WTE])  # which are one, and some files have only once
    with torch.device("meta"):
        model = GPT2ReproForCausalLM(GPT2ReproConfig(n_head=1, **_measure_shape(tensors)))
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}

    # The attention's projection is square: how all matrices lie shows in the MLP's first.
    linear = {name for name in expected if name.endswith(LINEAR_WEIGHTS)}
    if len(tensors[C_FC]) < tensors[C_FC].shape[1]:
        linear = set()
    expected |= {name: expected[name][::-1] for name in linear}
    if not any(name.endswith(".bias") for name in tensors):
        tensors |= {name: torch.zeros(shape) for name, shape in expected.items() if name.endswith(".bias")}

    if unknown := sorted(tensors.keys() - expected.keys()):
        raise UserError(f"no GPT-2 state dict: it has {unknown[0]} (unknown names: {len(unknown)})")
    if missing := sorted(expected.keys() - tensors.keys()):
        raise UserError(f"no whole GPT-2 state dict: it lacks {missing[0]} (missing names: {len(missing)})")
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise UserError(f"{name} is {tuple(tensors[name].shape)}, where GPT-2 of this size has {tuple(shape)}")
    if not torch.equal(tensors[HEAD], tensors[WTE]):
        raise UserError(f"{HEAD} differs from {WTE}: in GPT-2, and in nanoGPT since 14 January 2023, they are one")
    return {name: tensors[name].t().contiguous() if name in linear else tensors[name] for name in expected}


class _SavedSettings:
    """Stands in for a class of settings, such as build-nanogpt's `GPTConfig`: its fields, and none of its code."""


class _Skipped:
    """Stands in for a value that is not needed, such as NumPy's losses, or a path: takes anything and does nothing."""

    def __init__(self, *_: Any):
        pass

    def __setstate__(self, _: Any) -> None:
        pass


def _begin_dict(*_: Any) -> dict:
    """Stands in for `defaultdict`."""
    return {}


def _read_file(path: Path) -> dict[str, Any]:
    """Read plain data and tensors, where the file allows memory-mapped: the optimizer's moments are never read."""
    if path.is_dir():
        raise UserError(
            f"--checkpoint {path} is a folder: give the file in it; one with a config.json needs no conversion"
        )
    if not path.is_file():
        raise UserError(f"--checkpoint {path} is not a file: give the .pt file itself")
    content = describe_content(path)
    if content == LLMC_MODEL:
        return read_llmc_model(path)
    try:
        if content == SAFETENSORS:
            return safetensors.torch.load_file(path)
        saved = _unpickle(path, is_mapped=content == ZIP) if content in (None, ZIP) else None
    except UserError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise_if_refused(error, path)
        # Of torch's message what is wrong, not its advice to read the file as code.
        reason = str(error).split("WeightsUnpickler error:")[-1].strip().split("\n")[0] or type(error).__name__
        raise UserError(f"{path} is not a whole file of torch.save's: {reason}") from error
    if saved is None and content is not None:
        raise UserError(f"{path} is not a file of torch.save's: it is {content}")
    if not isinstance(saved, dict):
        raise UserError(f"{path} holds a {type(saved).__name__}, not a checkpoint's dict")
    return saved


def _unpickle(path: Path, is_mapped: bool) -> Any:
    """Read a file of torch.save's, with a stand-in for each class in it that is known to be data."""
    stand_ins: dict[str, Callable] = {}
    while True:
        try:
            with (
                warnings.catch_warnings(action="ignore"),  # of another pickle protocol
                torch.serialization.safe_globals([(stand_in, name) for name, stand_in in stand_ins.items()]),
            ):
                return torch.load(path, map_location="cpu", weights_only=True, mmap=is_mapped)
        except Exception as error:
            unknown = re.search(r"GLOBAL ([\w.]+)", str(error))
            name = unknown and (unknown[1] if "." in unknown[1] else f"builtins.{unknown[1]}")
            if name is None or name in stand_ins:
                raise
        if SETTINGS_CLASS.fullmatch(name):
            stand_ins[name] = _SavedSettings
        elif name == "collections.defaultdict":
            stand_ins[name] = _begin_dict
        elif SKIPPED_CLASS.fullmatch(name):
            stand_ins[name] = _Skipped
        else:
            raise UserError(f"{path} would run code ({name}) to be read: save the model's state_dict() alone")


def _measure_shape(tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    (vocab_size, n_embd), n_positions = tensors[WTE].shape, len(tensors[WPE])
    n_layer = len({name.split(".")[2] for name in tensors if name.startswith("transformer.h.")})
    return {"vocab_size": vocab_size, "n_positions": n_positions, "n_embd": n_embd, "n_layer": n_layer}


def _choose_n_head(shape: dict[str, int], declared: dict[str, Any], asked: int | None) -> int:
    """Check what the file says of its shape, and return the heads, which its weights do not show."""
    measured = {**shape, "block_size": shape["n_positions"]}
    for name in measured.keys() & declared.keys():
        if declared[name] != measured[name]:
            raise UserError(f"its configuration says {name} {declared[name]}, but its weights have {measured[name]}")
    n_embd, saved = shape["n_embd"], declared.get("n_head")
    if asked is not None and saved not in (None, asked):
        raise UserError(f"its configuration says n_head {saved}, which --n_head {asked} contradicts")
    if asked is None and saved is None and n_embd % 64:
        raise UserError(f"its weights do not show the heads, and a width of {n_embd} is not GPT-2's: add --n_head")
    n_head = next((value for value in (asked, saved) if value is not None), n_embd // 64)
    if type(n_head) is not int or n_head < 1 or n_embd % n_head:
        raise UserError(f"a width of {n_embd} cannot be divided among {n_head} heads")
    return n_head


def _guess_activation(content: dict[str, Any], weights: dict[str, torch.Tensor]) -> tuple[str, str]:
    """Return the activation and whose it is, for a file that cannot name it."""
    if content.get("format") == FORMAT:
        return "gelu_new", "llm.c's"
    if isinstance(content.get("config"), _SavedSettings):
        return "gelu_new", "build-nanogpt's"
    if isinstance(content.get("model_args"), dict):
        old = "bias" not in content["model_args"]
        return ("gelu_new", "nanoGPT's before 27 January 2023") if old else ("gelu", "nanoGPT's since 17 May 2023")
    # build-nanogpt saves causal masks, nanoGPT does not where torch has fused attention; OpenAI's are (in, out).
    if any(
        name.endswith(C_FC.removeprefix(TRUNK)) and len(weight) < weight.shape[-1] for name, weight in weights.items()
    ):
        return "gelu_new", "GPT-2's, as the file has its layout"
    if any(MASK_BUFFER.search(name) for name in weights):
        return "gelu_new", "build-nanogpt's, as the file has causal masks"
    return "gelu", "nanoGPT's since 17 May 2023, as the file has no causal masks"
