"""File types recognized by their first bytes, for messages about files whose content does not match their name."""

import codecs
import re
from pathlib import Path

from .errors import UserError

# UTF-32 first: its little-endian mark starts with UTF-16's.
BYTE_ORDER_MARKS = {
    "UTF-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),
    "UTF-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
}

# Descriptions by a regular expression of the first bytes. Each is long enough not to match headerless token ids.
LLMC_TOKENS = "an llm.c token shard"
LLMC_QUESTIONS = "an llm.c file of multiple-choice questions"
LLMC_MODEL = "an llm.c GPT-2 model"
NUMPY = "a NumPy array"
ZIP = "a zip archive"
SAFETENSORS = "a safetensors file"
PARQUET = "a parquet file"
ARROW = "an Arrow file"
COMPRESSED = "a compressed file: decompress it first"
EMPTY, TEXT = "empty", "text"
CONTENTS = {
    rb"version https://git-lfs": "a Git LFS pointer, not the file itself: fetch the file with git lfs pull",
    rb"\s*<(?i:!doctype|html|\?xml)": "a web page, not the file itself: download the file again",
    rb"\x1f\x8b\x08|\x28\xb5\x2f\xfd|\xfd7zXZ|BZh[1-9]1AY": COMPRESSED,
    rb"PK\x03\x04": ZIP,
    rb"\x93NUMPY": NUMPY,
    rb"PAR1": PARQUET,
    rb"ARROW1|\xff\xff\xff\xff": ARROW,
    rb"\x89HDF": "an HDF5 file",
    rb"GGUF": "a llama.cpp GGUF model",
    rb"(?s).{4}\0{4}\{\"": SAFETENSORS,
    rb"(?s).{257}ustar": "a tar archive",
} | {
    re.escape(magic.to_bytes(4, "little")): text
    for magic, text in {
        20240326: LLMC_MODEL,
        20240327: "an llm.c debug state",
        20240328: "an llm.c tokenizer",
        20240520: LLMC_TOKENS,
        20240522: LLMC_QUESTIONS,
        20240527: "an llm.c training state",
        20240801: "an llm.c token shard for Llama 3",
        20240803: "an llm.c Llama 3 model",
    }.items()
}


def describe_content(file: str | Path | bytes) -> str | None:
    """Describe a file, or its content, by its first bytes, as a phrase to follow "it is"; `None` if unknown."""
    if isinstance(file, bytes):
        head = file[:512]
    else:
        with open(file, "rb") as stream:
            head = stream.read(512)
    if not head:
        return EMPTY
    is_text = len(head) >= 16 and re.fullmatch(rb"[\t\n\r -~]+", head)
    return next((text for pattern, text in CONTENTS.items() if re.match(pattern, head)), TEXT if is_text else None)


def check_encoding(head: bytes, source: str | Path) -> None:
    """Reject text in UTF-16 or UTF-32, which Windows programs write, by its first four bytes `head`.

    Raises:
        UserError: there is such a byte order mark, or every other byte of the first letters is zero.
    """
    name = next((name for name, marks in BYTE_ORDER_MARKS.items() if head.startswith(marks)), None)
    if name is None and (head[1:4:2] == b"\0\0" or head[0:3:2] == b"\0\0"):
        name = "UTF-32" if head[:4].count(0) == 3 else "UTF-16"
    if name is not None and head.strip(b"\0"):
        raise UserError(f"{source} is {name}, not UTF-8: convert it first (iconv -f {name} -t UTF-8)")
