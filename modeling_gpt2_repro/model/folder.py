"""Model folders: checking one, identifying its weights, and saving a model as a checkpoint or in published form."""

import hashlib
import json
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..core.files import compute_checksum, write_json


def check_model_folder(name: str | Path) -> None:
    """Check that a model folder is one, holds safetensors, and that no index in it names a file outside of it.

    A Hub id passes: `from_pretrained(use_safetensors=True)` refuses pickles there, and a snapshot is one folder.

    Raises:
        ValueError: it is a file, its weights are pickled only, or an index is damaged or leads out of it.
    """
    folder = Path(name)
    if folder.is_file():
        raise ValueError(
            "it is a file, not a model folder: python -m modeling_gpt2_repro convert --checkpoint FILE "
            "--output_dir FOLDER makes one of a checkpoint of nanoGPT, build-nanogpt, llm.c or a state dict of GPT-2"
        )
    if any(folder.glob("pytorch_model*.bin")) and not any(folder.glob("*.safetensors")):
        raise ValueError(
            "it holds its weights as a pickle, which may run anything when opened: load it with from_pretrained where "
            "you trust it, and let save_pretrained write model.safetensors"
        )
    for index in folder.glob("*.index.json"):
        for file in set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()):
            if Path(file).name != file or file in ("", ".."):
                raise ValueError(f"{index} names {file!r}, which is not a file of its folder")


def identify_weights(folder: str | Path) -> str | None:
    """Return an identifier of the weights in a model folder: the checksum of their file, or of their checksums.

    `None` if there are none, as for a Hub id.
    """
    checksums = [f"{compute_checksum(path)} {path.name}" for path in sorted(Path(folder).glob("*.safetensors"))]
    if len(checksums) > 1:
        return f"sha256:{hashlib.sha256(chr(10).join(checksums).encode()).hexdigest()}"
    return checksums[0].split()[0] if checksums else None


def save_model(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Save weights, configuration, the model's two code files, generation settings and the tokenizer, if any."""
    eos_token_id = tokenizer.eos_token_id if tokenizer is not None else None
    model.generation_config = GenerationConfig(
        bos_token_id=eos_token_id, eos_token_id=eos_token_id, do_sample=True, top_k=50
    )
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def save_published_model(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Save a model folder whose configuration declares GPT-2, which its tensors are.

    Plain `AutoModelForCausalLM.from_pretrained(folder)` opens it as `GPT2LMHeadModel` of transformers, without this
    package; `trust_remote_code=True` gives our class from the folder's code files. Dropout belongs to a run and not to
    the weights, so it is saved as 0.0.
    """
    save_model(folder, model, tokenizer)
    write_json(folder / "config.json", describe_as_gpt2(model.config))


def describe_as_gpt2(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the content of `config.json` in a folder that declares GPT-2, given our configuration."""
    # to_dict and not a saved file, which omits values equal to our defaults: stock GPT-2's dropouts default to 0.1.
    content = {name: 0.0 if name.endswith("_pdrop") else value for name, value in config.to_dict().items()}
    # OpenAI's files also have n_positions as n_ctx, which llama.cpp's converter needs.
    names = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_ctx": content["n_positions"]}
    return content | names
