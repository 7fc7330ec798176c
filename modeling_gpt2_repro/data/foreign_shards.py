"""Token files of other programs, and hints for folders without shards.

Supported are llm.c's `.bin` shards, which modded-nanogpt also writes, and nanoGPT's `train.bin` and `val.bin`.
"""

from pathlib import Path

import numpy as np

from ..core.errors import UserError
from ..core.file_kinds import LLMC_QUESTIONS, LLMC_TOKENS, describe_content

SHARD_SUFFIXES = (".npy", ".bin")

# llm.c, dev/data/data_common.py: a header of 256 int32 (magic, version, number of tokens), then uint16 ids.
LLMC_VERSION = 1
LLMC_HEADER_BYTES = 256 * 4

# nanoGPT, data/*/prepare.py: uint16 ids without a header. A character-level vocabulary is stored in meta.pkl.
NANOGPT_NAMES = ("train.bin", "val.bin")
NANOGPT_CHARACTERS = "meta.pkl"
# Enough ids to distinguish uint16 from wider integers, whose upper halves are all zero.
NANOGPT_SAMPLE_TOKENS = 2**20


def locate_tokens(path: Path) -> tuple[int, int]:
    """Return the byte offset of the uint16 ids in a `.bin` file, and their number.

    Raises:
        UserError: the file is not a complete shard of llm.c or nanoGPT.
    """
    content = describe_content(path)
    if content == LLMC_TOKENS:
        return LLMC_HEADER_BYTES, _count_llmc_tokens(path)
    if content is None and path.name in NANOGPT_NAMES:
        return 0, _count_nanogpt_tokens(path)
    names = " and ".join(NANOGPT_NAMES)
    reason = f"it is {content}" if content else f"it has no header (only nanoGPT's {names} may have none)"
    raise UserError(f"{path} is not an llm.c shard of uint16 token ids: {reason}")


def _count_llmc_tokens(path: Path) -> int:
    header = np.fromfile(path, dtype="<i4", count=3)
    if len(header) < 3 or header[1] != LLMC_VERSION:
        raise UserError(f"{path} is not an llm.c shard of version {LLMC_VERSION}: prepare the data again")
    n_tokens, size = int(header[2]), path.stat().st_size
    expected = LLMC_HEADER_BYTES + 2 * n_tokens
    if size != expected:
        state = "truncated" if size < expected else "too long"
        raise UserError(
            f"{path} is {state}: {n_tokens:,} tokens according to its header need {expected:,} bytes, but it has "
            f"{size:,}; copy it again"
        )
    return n_tokens


def _count_nanogpt_tokens(path: Path) -> int:
    if (path.parent / NANOGPT_CHARACTERS).exists():
        raise UserError(
            f"{path} uses a character-level vocabulary ({NANOGPT_CHARACTERS} is beside it), not GPT-2's tokens: run "
            "prepare_data.py --files on its source text"
        )
    if path.stat().st_size % 2:
        raise UserError(
            f"{path} has an odd number of bytes, but nanoGPT's uint16 token ids take two bytes each: copy it again"
        )
    sample = np.fromfile(path, dtype="<u2", count=NANOGPT_SAMPLE_TOKENS)
    if len(sample) > 1 and not sample[1::2].any():
        raise UserError(f"{path} has integers of four bytes or more, not uint16 token ids: prepare the data again")
    return path.stat().st_size // 2


def is_question_file(path: Path) -> bool:
    """Return whether a file is an llm.c question file such as `hellaswag_val.bin`, which is named like a shard."""
    return path.suffix == ".bin" and path.is_file() and describe_content(path) == LLMC_QUESTIONS


def describe_other_data(folder: Path) -> str:
    """Describe what a folder without shards contains and how to make shards of it, as the end of a sentence."""
    from .sources.local_files import SUFFIXES  # slow to import, and training does not need it

    names = {path.name for path in folder.iterdir()}
    if names & {"dataset_info.json", "dataset_dict.json"}:
        return "; it is a save_to_disk dataset: export it with to_parquet for prepare_data.py --files"
    for suffix in SUFFIXES:
        if any(name.endswith(suffix) for name in names):
            return f"; it contains text: run prepare_data.py --files '{folder}/*{suffix}'"
    if any(name.endswith(".idx") for name in names):
        return "; it contains a Megatron indexed dataset, which is not supported: run prepare_data.py on its text"
    if inside := sorted(path for suffix in SHARD_SUFFIXES for path in folder.glob(f"*/*{suffix}")):
        return f"; {inside[0].parent} has some: put the shards of both splits into one folder"
    if others := sorted(name for name in names if name.endswith(SHARD_SUFFIXES)):
        return f"; it contains other files, such as {others[0]}"
    return ": create them with prepare_data.py"
