"""Token files of other programs: llm.c's `.bin` shards, which modded-nanogpt writes too, and nanoGPT's `train.bin` and
`val.bin`; and what else a folder without shards may hold."""

from pathlib import Path

import numpy as np

from ..core.errors import UserError
from ..core.file_kinds import LLMC_QUESTIONS, LLMC_TOKENS, describe_content

SHARD_SUFFIXES = (".npy", ".bin")

# llm.c, dev/data/data_common.py: 256 int32 of header (magic, version, number of tokens), then uint16 ids.
LLMC_VERSION = 1
LLMC_HEADER_BYTES = 256 * 4

# nanoGPT, data/*/prepare.py: uint16 ids and nothing else. A character-level vocabulary comes with a file of its own.
NANOGPT_NAMES = ("train.bin", "val.bin")
NANOGPT_CHARACTERS = "meta.pkl"
# Enough ids to tell wider integers, every other half of which is zero, from uint16.
NANOGPT_SAMPLE_TOKENS = 2**20


def locate_tokens(path: Path) -> tuple[int, int]:
    """Return the byte at which the uint16 ids of a `.bin` file begin, and their number.

    Raises:
        UserError: the file is neither a whole shard of llm.c's nor nanoGPT's.
    """
    content = describe_content(path)
    if content == LLMC_TOKENS:
        return LLMC_HEADER_BYTES, _count_llmc_tokens(path)
    if content is None and path.name in NANOGPT_NAMES:
        return 0, _count_nanogpt_tokens(path)
    names = " and ".join(NANOGPT_NAMES)
    reason = f"it is {content}" if content else f"it has no header, as only nanoGPT's {names} may"
    raise UserError(f"{path} is not a shard of llm.c's uint16 token ids: {reason}")


def _count_llmc_tokens(path: Path) -> int:
    header = np.fromfile(path, dtype="<i4", count=3)
    if len(header) < 3 or header[1] != LLMC_VERSION:
        raise UserError(f"{path} is not a shard of llm.c's version {LLMC_VERSION}: prepare the data again")
    n_tokens, size = int(header[2]), path.stat().st_size
    expected = LLMC_HEADER_BYTES + 2 * n_tokens
    if size != expected:
        state = "truncated" if size < expected else "longer than it says"
        raise UserError(f"{path} is {state}: its header says {n_tokens:,} tokens, and it has {size:,} bytes")
    return n_tokens


def _count_nanogpt_tokens(path: Path) -> int:
    if (path.parent / NANOGPT_CHARACTERS).exists():
        raise UserError(
            f"{path} holds characters of a vocabulary of its own, as the {NANOGPT_CHARACTERS} beside it says, and not "
            "GPT-2's tokens: run prepare_data.py --files on the text that it was made of"
        )
    if path.stat().st_size % 2:
        raise UserError(
            f"{path} has an odd number of bytes, and nanoGPT's uint16 token ids have two each: copy it again"
        )
    sample = np.fromfile(path, dtype="<u2", count=NANOGPT_SAMPLE_TOKENS)
    if len(sample) > 1 and not sample[1::2].any():
        raise UserError(f"{path} holds numbers of four bytes or more, not uint16 token ids: prepare the data again")
    return path.stat().st_size // 2


def is_question_file(path: Path) -> bool:
    """Return whether a file is one of llm.c's `hellaswag_val.bin` and such, which are named like its shards."""
    return path.suffix == ".bin" and path.is_file() and describe_content(path) == LLMC_QUESTIONS


def describe_other_data(folder: Path) -> str:
    """Describe what a folder without shards has that could be made into some: a clause to end a sentence with."""
    from .sources.local_files import SUFFIXES  # slow to import, and training does without it

    names = {path.name for path in folder.iterdir()}
    if names & {"dataset_info.json", "dataset_dict.json"}:
        return "; it is a dataset of save_to_disk: write it with to_parquet, for prepare_data.py --files"
    for suffix in SUFFIXES:
        if any(name.endswith(suffix) for name in names):
            return f"; it holds text: run prepare_data.py --files '{folder}/*{suffix}'"
    if any(name.endswith(".idx") for name in names):
        return "; it holds an indexed dataset of Megatron's, which is not read: prepare its text with prepare_data.py"
    if inside := sorted(path for suffix in SHARD_SUFFIXES for path in folder.glob(f"*/*{suffix}")):
        return f"; there are some in {inside[0].parent}: those of both splits must be in one folder"
    if others := sorted(name for name in names if name.endswith(SHARD_SUFFIXES)):
        return f"; it has others, such as {others[0]}"
    return ": make some with prepare_data.py"
