"""Fast encoding of documents for shards.

Documents are encoded as plain text: a document that spells `<|endoftext|>` gets the ids of those characters, and so
cannot forge a document boundary. This holds for every tokenizer, even if its model's vocabulary contains special
tokens.
"""

import dataclasses
import importlib.metadata
import json
import secrets
from typing import Any

import gigatoken
import numpy as np
import pyarrow as pa
import tokenizers
from transformers import PreTrainedTokenizerFast

from ...core.devices import measure_private_memory
from ...core.errors import UserError, format_line
from ...core.optional import not_none
from ..shards import MAX_VOCAB_SIZE
from ..tokenizer import BYTE_TOKEN, ODD_SAMPLE, list_merges

# gigatoken caches every word, about 100 bytes each, without limit, in tables that double as they fill. Prose fills the
# cache so slowly that rebuilding the engine (0.1 s) at this size costs nothing; text of only new words triggers a
# rebuild every million words or two, for a fifth of the time.
ENGINE_BYTES = 96 * 2**20
# Cache growth per byte of text if every word is new, for platforms where a process cannot measure its own memory.
ENGINE_BYTES_PER_TEXT_BYTE = 6

# The last code point, a noncharacter.
UNKNOWN_TEXT = "\U0010ffff"


class UnknownTextError(UserError):
    """A text contains something for which the tokenizer has no token."""


@dataclasses.dataclass(eq=False, repr=False)
class DocumentEncoder:
    """Encodes documents as plain text, on the calling thread.

    A forked worker inherits its parent's engine. A spawned one, to which the encoder is pickled, builds its own.
    """

    tokenizer_json: str
    eot_id: int
    uses_gigatoken: bool

    def __post_init__(self) -> None:
        self._build_engine()

    def __reduce__(self) -> tuple[Any, ...]:
        return DocumentEncoder, (self.tokenizer_json, self.eot_id, self.uses_gigatoken)

    def encode(self, documents: pa.LargeStringArray) -> tuple[np.ndarray, np.ndarray]:
        """Encode a batch of documents.

        Returns:
            The concatenated ids of all documents, uint16 of shape `(tokens,)`, and offsets, int64 of shape
            `(documents + 1,)`, at which each document starts and the last one ends. End-of-text ids are neither added
            nor produced.

        Raises:
            UnknownTextError: the tokenizer has no token for a text, not even an unknown token.
            UserError: the tokenizer encodes a text as its end-of-text id.
        """
        encode = self._encode_fast if self.uses_gigatoken else self._encode_slowly
        tokens, offsets = encode(documents)
        if (tokens == self.eot_id).any():
            raise UserError(
                "the tokenizer encodes unknown text as its end-of-text id, which would split the document: choose one "
                "whose unk_token is not its eos_token"
            )
        return tokens, offsets

    def encode_text(self, text: str) -> np.ndarray:
        """Encode one document (see `encode`)."""
        return self.encode(pa.array([text], pa.large_string()))[0]

    def _encode_slowly(self, documents: pa.LargeStringArray) -> tuple[np.ndarray, np.ndarray]:
        try:
            # One at a time: a batch would start threads, which is unsafe in a forked worker.
            encodings = [self._engine.encode(text).ids for text in documents.to_pylist()]
        except Exception as error:  # tokenizers raises nothing more specific
            raise UnknownTextError(f"the tokenizer cannot encode a text: {format_line(str(error))}") from error
        offsets = np.cumsum([0, *map(len, encodings)], dtype=np.int64)
        return np.fromiter((i for ids in encodings for i in ids), np.uint16, count=offsets[-1]), offsets

    def _encode_fast(self, documents: pa.LargeStringArray) -> tuple[np.ndarray, np.ndarray]:
        text_offsets, text = get_text_buffers(documents)
        if self._engine_bytes > ENGINE_BYTES:
            self._build_engine()
        texts = _view_as_awkward(text_offsets, text)
        before = measure_private_memory()
        encoded = self._engine.encode_batch(texts, parallel=False).layout
        # Measured around this call only: a worker's other allocations are as large, and counting them would trigger
        # needless rebuilds, which lose the cache.
        if before is not None:
            self._engine_bytes += max(0, not_none(measure_private_memory()) - before)
        else:
            self._engine_bytes += ENGINE_BYTES_PER_TEXT_BYTE * int(text_offsets[-1] - text_offsets[0])
        offsets = np.asarray(encoded.offsets.data, dtype=np.int64)
        tokens = np.asarray(encoded.content.data)[offsets[0] : offsets[-1]].astype(np.uint16)
        return tokens, offsets - offsets[0]

    def _build_engine(self) -> None:
        self._engine: Any = None  # free the old engine before building the new one
        self._engine_bytes = 0
        if self.uses_gigatoken:
            import awkward  # noqa: F401  half a second; imported here so that `build_encoder` sees a failure

            self._engine = gigatoken.Tokenizer(gigatoken.gigatoken_rs.load_hf_json(self.tokenizer_json))
        else:
            self._engine = tokenizers.Tokenizer.from_str(self.tokenizer_json)


def build_encoder(tokenizer: PreTrainedTokenizerFast, name: str) -> DocumentEncoder:
    """Check that `tokenizer` is suitable for shards, and choose the engine: gigatoken, or `tokenizers` as a fallback.

    Raises:
        UserError: the tokenizer has more than 65,536 ids or no end-of-text token, some text encodes to that token, or
            gigatoken disagrees with `tokenizers`.
    """
    _check_ids(tokenizer, name)
    definition = json.dumps(define_text_encoding(tokenizer))
    try:
        encoder = DocumentEncoder(definition, tokenizer.eos_token_id, uses_gigatoken=True)
    # Raised by gigatoken for unsupported features, and by awkward under `python -X dev`.
    except (ValueError, RuntimeError, TypeError, LookupError) as error:
        reason = format_line(str(error))
        print(f"gigatoken does not support {name}; falling back to the slower `tokenizers`: {reason}", flush=True)
        encoder = DocumentEncoder(definition, tokenizer.eos_token_id, uses_gigatoken=False)
    else:
        check_engines_agree(encoder, name)
    check_boundaries(encoder, tokenizer.eos_token, name)
    return encoder


def define_text_encoding(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Return a `tokenizer.json` definition of `tokenizer` that encodes plain text only.

    No text encodes to a special token or the end-of-text id, and texts are not truncated, padded or surrounded by
    tokens. The ids of text that does not spell a special token are unchanged. To this end special tokens are removed
    from the added tokens, and renamed to random strings in the model's vocabulary.
    """
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    definition.update(truncation=None, padding=None, post_processor=None)
    # The end-of-text token may be an added token that is not marked as special.
    special = {token["id"] for token in definition["added_tokens"] if token["special"]} | {tokenizer.eos_token_id}
    definition["added_tokens"] = [token for token in definition["added_tokens"] if token["id"] not in special]
    model = definition["model"]
    is_list = isinstance(model["vocab"], list)  # Unigram's words with their scores, in the order of the ids
    words = [(word, i) for i, (word, _) in enumerate(model["vocab"])] if is_list else model["vocab"].items()
    hidden = {
        word: f"{word} {secrets.token_hex(16)}"
        for word, index in words
        # Bytes and single characters are needed by other text.
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
            for left, right in list_merges(model)
            if hidden.keys().isdisjoint((left, right, left + right.removeprefix(prefix)))
        ]
    return definition


def check_engines_agree(encoder: DocumentEncoder, name: str) -> None:
    """Check that gigatoken and `tokenizers` encode `ODD_SAMPLE` to the same ids.

    Raises:
        UserError: they do not.
    """
    reference = dataclasses.replace(encoder, uses_gigatoken=False)
    for text in ODD_SAMPLE:
        if not np.array_equal(encoder.encode_text(text), reference.encode_text(text)):
            raise UserError(
                f"gigatoken {importlib.metadata.version('gigatoken')} and tokenizers {tokenizers.__version__} encode "
                f"{text!r} differently with the tokenizer {name}: install the versions of constraints.txt"
            )


def check_boundaries(encoder: DocumentEncoder, eos_token: str, name: str) -> None:
    """Check that no text encodes to the end-of-text id, and that text that spells the end-of-text token is not lost.

    Print a note if such text becomes the unknown token, as line breaks do if they are the end-of-text token.

    Raises:
        UserError: a check failed.
    """
    encodings = {}
    for text in (eos_token, UNKNOWN_TEXT, *ODD_SAMPLE):
        try:
            encodings[text] = encoder.encode_text(text).tolist()
        except UnknownTextError:  # the vocabulary does not cover all text
            continue
        except UserError as error:
            raise UserError(f"cannot make shards with the tokenizer {name}: {error}") from error
    if encodings.get(eos_token) == []:
        raise UserError(
            f"cannot make shards with the tokenizer {name}: it has no other tokens for text that spells its "
            f"end-of-text token {eos_token!r} (eos_token): choose another one"
        )
    if encodings.get(eos_token, []) == encodings.get(UNKNOWN_TEXT):
        print(
            f"the tokenizer {name} encodes {eos_token!r}, its end-of-text token, as unknown text in documents",
            flush=True,
        )


def get_text_buffers(documents: pa.LargeStringArray) -> tuple[np.ndarray, np.ndarray]:
    """Return zero-copy views of an array's offsets, int64 of shape `(documents + 1,)`, and UTF-8 bytes, uint8."""
    _, offsets, text = documents.buffers()
    first = documents.offset
    return (
        np.frombuffer(offsets, np.int64)[first : first + len(documents) + 1],
        np.frombuffer(text, np.uint8) if text is not None else np.empty(0, np.uint8),
    )


def _check_ids(tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    if len(tokenizer) > MAX_VOCAB_SIZE:
        raise UserError(
            f"the tokenizer {name} has {len(tokenizer):,} ids, but shards store 16-bit ids: choose one with at most "
            f"{MAX_VOCAB_SIZE:,}"
        )
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer {name} has no end-of-text token (eos_token), which must precede each document: choose "
            "another one"
        )
    if max(tokenizer.get_vocab().values()) >= len(tokenizer):
        raise UserError(
            f"the tokenizer {name} has gaps in its ids: its {len(tokenizer):,} tokens must have consecutive ids from 0"
        )


def _view_as_awkward(offsets: np.ndarray, text: np.ndarray) -> Any:
    import awkward

    characters = awkward.contents.NumpyArray(text, parameters={"__array__": "char"})
    strings = awkward.contents.ListOffsetArray(
        awkward.index.Index64(offsets), characters, parameters={"__array__": "string"}
    )
    return awkward.Array(strings)
