"""The `convert` command: write checkpoints of other projects as model folders."""

from dataclasses import MISSING, dataclass
from pathlib import Path

from ..core.arguments import Config, setting
from ..core.errors import UserError
from ..core.files import TEMPORARY_SUFFIX, check_writable, create_folder_atomically, follow_links
from ..core.locks import FolderLock
from ..core.streams import silence_libraries
from ..data.tokenizer import GPT2_TOKENIZER, load_tokenizer
from ..model.convert_nanogpt import Activation, load_nanogpt
from ..model.folder import save_published_model


@dataclass
class ConvertConfig(Config):
    """Command-line flags."""

    checkpoint: str = setting(
        MISSING, "nanoGPT or build-nanogpt .pt file, bare state dict, or llm.c .bin file", path=True
    )
    output_dir: str = setting(MISSING, "model folder to create; must not exist yet", path=True)
    tokenizer: str = setting(
        GPT2_TOKENIZER,
        "Hub id or folder; embedding rows beyond its ids are dropped; none: keep all rows and save no tokenizer",
        path=True,
    )
    activation_function: Activation = setting(
        "auto", "gelu: exact; gelu_new: tanh approximation, as in build-nanogpt and nanoGPT before May 17, 2023"
    )
    n_head: int | None = setting(None, "attention heads of a bare state dict (default: n_embd / 64, as in GPT-2)")


def run(config: ConvertConfig) -> None:
    """Convert a checkpoint and print its shape."""
    silence_libraries()
    check_writable(config.output_dir, is_folder=True)
    output = follow_links(config.output_dir)
    check_is_free(output)
    tokenizer = None if config.tokenizer == "none" else load_tokenizer(config.tokenizer)
    model = load_nanogpt(
        config.checkpoint,
        tokenizer,
        activation_function=config.activation_function,
        n_head=config.n_head,
        report=print,
    )
    with FolderLock(output.parent, f".{output.name}.lock", f"another process is writing {output.name} in"):
        check_is_free(output)
        with create_folder_atomically(output) as temporary:
            save_published_model(temporary, model, tokenizer)
    for name in ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size", "activation_function"):
        print(f"{name}: {getattr(model.config, name)}")
    print(f"parameters: {model.num_parameters():,}")
    print(f"written: {config.output_dir}")


def check_is_free(output: Path) -> None:
    """Raise a `UserError` if the output folder or its temporary folder already exists."""
    for path in (output, output.with_name(output.name + TEMPORARY_SUFFIX)):
        if path.exists():
            raise UserError(f"{path} already exists: pass another --output_dir, or delete it")
