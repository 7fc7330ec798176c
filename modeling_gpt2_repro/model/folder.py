"""Model folders: checking them, identifying their weights, and saving models as checkpoints or in published form."""

import hashlib
import json
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..core.files import compute_checksum, write_json


def check_model_folder(name: str | Path) -> None:
    """Check that a model folder contains safetensors and that its indices name only files in it.

    A Hub id passes: `from_pretrained(use_safetensors=True)` rejects pickles there, and a snapshot is a single folder.

    Raises:
        ValueError: it is a file, it has only pickled weights, or an index is damaged or names a file elsewhere.
    """
    folder = Path(name)
    if folder.is_file():
        raise ValueError(
            "it is a file, not a model folder; convert a nanoGPT, build-nanogpt or llm.c checkpoint or a GPT-2 state "
            "dict with: python -m modeling_gpt2_repro convert --checkpoint FILE --output_dir FOLDER"
        )
    if any(folder.glob("pytorch_model*.bin")) and not any(folder.glob("*.safetensors")):
        raise ValueError(
            "its weights are pickled, and a pickle can run arbitrary code when opened: if you trust it, load it with "
            "from_pretrained and write model.safetensors with save_pretrained"
        )
    for index in folder.glob("*.index.json"):
        for file in set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()):
            if Path(file).name != file or file in ("", ".."):
                raise ValueError(f"{index} names {file!r}, which is not a file in its folder")


def identify_weights(folder: str | Path) -> str | None:
    """Return an identifier of the weights in a model folder: the checksum of their file, or of the shards' checksums.

    `None` if there are none, as for a Hub id.
    """
    checksums = [f"{compute_checksum(path)} {path.name}" for path in sorted(Path(folder).glob("*.safetensors"))]
    if len(checksums) > 1:
        return f"sha256:{hashlib.sha256(chr(10).join(checksums).encode()).hexdigest()}"
    return checksums[0].split()[0] if checksums else None


def save_model(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Save weights, configuration, the two code files, the generation config and the tokenizer, if there is one."""
    eos_token_id = tokenizer.eos_token_id if tokenizer is not None else None
    model.generation_config = GenerationConfig(
        bos_token_id=eos_token_id, eos_token_id=eos_token_id, do_sample=True, top_k=50
    )
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def save_published_model(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Save a model folder whose configuration declares stock GPT-2, which its tensors match.

    Without this package, `AutoModelForCausalLM.from_pretrained(folder)` opens it as transformers' `GPT2LMHeadModel`;
    with `trust_remote_code=True`, as `GPT2ReproForCausalLM` from the folder's code files. Dropout is a property of a
    run, not of the weights, so it is saved as 0.0.
    """
    save_model(folder, model, tokenizer)
    write_json(folder / "config.json", describe_as_gpt2(model.config))


def describe_as_gpt2(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the content of a `config.json` that declares stock GPT-2, given our configuration."""
    # From to_dict, because a saved file omits our defaults, and stock GPT-2's differ: its dropouts default to 0.1.
    content = {name: 0.0 if name.endswith("_pdrop") else value for name, value in config.to_dict().items()}
    # llama.cpp's converter needs n_ctx, which OpenAI's files have in addition to n_positions.
    names = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_ctx": content["n_positions"]}
    return content | names
