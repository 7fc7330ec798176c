"""A model folder: what makes one, how it is told from another, and how a model is written into it."""

import hashlib
import json
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from modeling_gpt2_repro.core.files import compute_checksum, write_json


def check_model_folder(name: str | Path) -> None:
    """Check that what is to be a model folder, or a name on the Hub, is not a file.

    Raises:
        ValueError: it is.
    """
    if Path(name).is_file():
        raise ValueError(
            "it is a file, not a model folder: python -m modeling_gpt2_repro convert --checkpoint FILE "
            "--output_dir FOLDER makes one of a checkpoint of nanoGPT, build-nanogpt, llm.c or a state dict of GPT-2"
        )


def check_weight_names(folder: str | Path) -> None:
    """Check what the index of a model in several files calls them; transformers would follow a path out of `folder`.

    Raises:
        ValueError: an index is damaged, or names a file that is not in the folder.
    """
    for index in Path(folder).glob("*.index.json") if Path(folder).is_dir() else ():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        for name in names:
            if Path(name).name != name or name in ("", ".."):
                raise ValueError(f"{index} names {name!r}, which is not a file of its folder")


def identify_weights(folder: str | Path) -> str | None:
    """Return what tells the weights in a model folder from others: the checksum of their file, or of all checksums.

    `None` where there are none, as for the name of a model on the Hub.
    """
    checksums = [f"{compute_checksum(path)} {path.name}" for path in sorted(Path(folder).glob("*.safetensors"))]
    if len(checksums) > 1:
        return f"sha256:{hashlib.sha256(chr(10).join(checksums).encode()).hexdigest()}"
    return checksums[0].split()[0] if checksums else None


def save_model(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Write weights, configuration, the model's two code files, generation settings and the tokenizer, if any."""
    eos_token_id = tokenizer.eos_token_id if tokenizer is not None else None
    model.generation_config = GenerationConfig(
        bos_token_id=eos_token_id, eos_token_id=eos_token_id, do_sample=True, top_k=50
    )
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def save_published_model(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Write a model folder that names itself GPT-2, which is what its tensors are.

    Plain `AutoModelForCausalLM.from_pretrained(folder)` opens it as transformers' own `GPT2LMHeadModel`, with nothing
    of ours installed; with `trust_remote_code=True` the code files in it give our class. Dropout belongs to a run and
    not to the weights: it is written as 0.0.
    """
    save_model(folder, model, tokenizer)
    write_json(folder / "config.json", describe_as_gpt2(model.config))


def describe_as_gpt2(config: PreTrainedConfig) -> dict[str, Any]:
    """Return what `config.json` says in a folder that names itself GPT-2, given our configuration."""
    # to_dict and not a saved file, which leaves out what equals our defaults: stock GPT-2's dropouts default to 0.1.
    content = {name: 0.0 if name.endswith("_pdrop") else value for name, value in config.to_dict().items()}
    # n_ctx is n_positions in OpenAI's files, and llama.cpp's converter asks for it.
    names = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_ctx": content["n_positions"]}
    return content | names
