"""llm.c's model files, as written by its train_gpt2.py and its C programs."""

import pytest
import torch
from nanogpt_files import SHAPE, Reference, assert_same_function

from modeling_gpt2_repro.core.errors import UserError
from modeling_gpt2_repro.model.convert_nanogpt import load_nanogpt

LLMC_ORDER = ["ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"]


def save_llmc(path, reference, version=3, magic=20240326, n_rows=128):
    """Write a model file as llm.c's train_gpt2.py and its C programs do."""
    weights, vocab_size = reference.state_dict(), reference.lm_head.out_features
    header = torch.zeros(256, dtype=torch.int32)
    sizes = [SHAPE["block_size"], vocab_size, SHAPE["n_layer"], reference.n_head, SHAPE["n_embd"], n_rows]
    header[:8] = torch.tensor([magic, version, *sizes])
    wte = weights["transformer.wte.weight"]
    tensors = [torch.cat([wte, wte.new_zeros(n_rows - vocab_size, wte.shape[1])]), weights["transformer.wpe.weight"]]
    for module in LLMC_ORDER:
        for part in ("weight", "bias"):
            tensors += [weights[f"transformer.h.{i}.{module}.{part}"] for i in range(SHAPE["n_layer"])]
    tensors += [weights["transformer.ln_f.weight"], weights["transformer.ln_f.bias"]]
    dtype = torch.bfloat16 if version == 5 else torch.float32
    body = torch.cat([tensor.flatten() for tensor in tensors]).to(dtype)
    path.write_bytes(header.numpy().tobytes() + body.view(torch.uint8).numpy().tobytes())
    return path


@pytest.mark.parametrize("version", [3, 5])
def test_llmc(tmp_path, version):
    reference, lines = Reference(gelu="gelu_new", n_head=4), []
    model = load_nanogpt(save_llmc(tmp_path / "gpt2.bin", reference, version), None, report=lines.append)
    assert "gelu_new, llm.c's" in lines[0]
    assert model.config.vocab_size == 97 and model.config.n_head == 4
    assert_same_function(model, reference.bfloat16().float() if version == 5 else reference)


def test_other_files_of_llmc_are_rejected(tmp_path):
    path = save_llmc(tmp_path / "gpt2.bin", Reference())
    content = path.read_bytes()
    for damaged, complaint in [
        (content[:-4], "is damaged"),
        (content + b"1234", "is damaged"),
        (content[:900], "unsupported version"),
        (content[:4] + b"\1\0\0\0" + content[8:], "unsupported version.*3 and 5"),
        (content[:16] + b"\0\0\0\0" + content[20:], "is damaged"),
        (content[:16] + b"\xff\xff\xff\x7f" + content[20:], "is damaged"),
        (content[:16] + b"\xff\xff\xff\xff" + content[20:], "is damaged"),
        ((20240327).to_bytes(4, "little") + content[4:], "llm.c debug state"),
        ((20240520).to_bytes(4, "little") + content[4:], "llm.c token shard"),
        ((20240803).to_bytes(4, "little") + content[4:], "llm.c Llama 3 model"),
    ]:
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=complaint):
            load_nanogpt(path, None)
