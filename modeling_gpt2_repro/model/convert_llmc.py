"""Reader for GPT-2 checkpoints of karpathy/llm.c (`gpt2_124M.bin`, `model_00019560.bin`), in nanoGPT's form."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..core.errors import UserError

FORMAT = "llm.c"
# llm.c's train_gpt2.py, write_model: a header of 256 int32, then the tensors. Earlier versions did not pad the
# vocabulary.
HEADER_BYTES = 256 * 4
DTYPES = {3: torch.float32, 5: torch.bfloat16}


def read_llmc_model(path: Path) -> dict[str, Any]:
    """Return `model` (a memory-mapped state dict with weights (out, in)), `model_args` (its shape) and `format`.

    Raises:
        UserError: the file has an unsupported version, or its size contradicts its header.
    """
    header = np.fromfile(path, dtype="<i4", count=256).tolist()
    if len(header) < 256 or header[1] not in DTYPES:
        versions = " and ".join(map(str, DTYPES))
        raise UserError(f"{path} is an llm.c model of an unsupported version: only versions {versions} can be read")
    dtype = DTYPES[header[1]]
    names = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")
    model_args = dict(zip(names, header[2:7], strict=True))
    if min(header[2:8]) < 1 or header[4] > path.stat().st_size:
        raise UserError(f"{path} is damaged: its header has {model_args}")
    shapes = _list_shapes(model_args["block_size"], model_args["n_layer"], model_args["n_embd"], n_rows=header[7])
    sizes = [math.prod(shape) for shape in shapes.values()]
    expected = HEADER_BYTES + dtype.itemsize * sum(sizes)
    if path.stat().st_size != expected:
        raise UserError(f"{path} is damaged: its header implies {expected:,} bytes, it has {path.stat().st_size:,}")
    integers = np.memmap(path, dtype=f"<i{dtype.itemsize}", mode="c", offset=HEADER_BYTES)
    parts = torch.from_numpy(integers).view(dtype).split(sizes)
    weights = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
    # llm.c pads the vocabulary to a multiple of 128 with rows of zeros.
    weights["transformer.wte.weight"] = weights["transformer.wte.weight"][: model_args["vocab_size"]]
    return {"model": weights, "model_args": model_args, "format": FORMAT}


def _list_shapes(block_size: int, n_layer: int, n_embd: int, n_rows: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes in file order, grouped by kind of tensor, not by layer; `n_rows` is the padded vocabulary."""
    modules: dict[str, tuple[int, ...]] = {
        "ln_1": (n_embd,),
        "attn.c_attn": (3 * n_embd, n_embd),
        "attn.c_proj": (n_embd, n_embd),
        "ln_2": (n_embd,),
        "mlp.c_fc": (4 * n_embd, n_embd),
        "mlp.c_proj": (n_embd, 4 * n_embd),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (n_rows, n_embd),
        "transformer.wpe.weight": (block_size, n_embd),
    }
    for module, shape in modules.items():
        shapes |= {f"transformer.h.{i}.{module}.weight": shape for i in range(n_layer)}
        shapes |= {f"transformer.h.{i}.{module}.bias": shape[:1] for i in range(n_layer)}
    return shapes | {"transformer.ln_f.weight": (n_embd,), "transformer.ln_f.bias": (n_embd,)}
