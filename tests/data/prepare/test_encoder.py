"""Encoding documents: published ids, special tokens in text, and agreement of both engines."""

import dataclasses
import itertools
import json
import multiprocessing
import pickle

import numpy as np
import pyarrow as pa
import pytest
from published_ids import PUBLISHED
from tiny_tokenizers import FAMILIES, LINES
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import GPT2TokenizerFast, PreTrainedTokenizerFast

from modeling_gpt2_repro.core.devices import measure_private_memory
from modeling_gpt2_repro.core.errors import UserError
from modeling_gpt2_repro.data.prepare import encoder as encoding
from modeling_gpt2_repro.data.prepare.encoder import (
    DocumentEncoder,
    UnknownTextError,
    build_encoder,
    check_engines_agree,
    define_text_encoding,
)
from modeling_gpt2_repro.data.tokenizer import ODD_SAMPLE


@pytest.fixture(scope="module")
def gigatoken_encoder(tokenizer):
    encoder = build_encoder(tokenizer, "gpt2")
    assert encoder.uses_gigatoken
    return encoder


@pytest.fixture(scope="module")
def reference_encoder(gigatoken_encoder):
    return dataclasses.replace(gigatoken_encoder, uses_gigatoken=False)


def encode(encoder, texts):
    tokens, offsets = encoder.encode(pa.array(texts, pa.large_string()))
    assert tokens.dtype == np.uint16
    return [tokens[start:end].tolist() for start, end in itertools.pairwise(offsets)]


@pytest.mark.parametrize("engine", ["gigatoken_encoder", "reference_encoder"])
def test_encodes_published_ids(engine, request):
    assert encode(request.getfixturevalue(engine), list(PUBLISHED)) == list(PUBLISHED.values())


@pytest.mark.parametrize("engine", ["gigatoken_encoder", "reference_encoder"])
def test_special_token_in_text_stays_text(engine, request):
    assert encode(request.getfixturevalue(engine), ["<|endoftext|>"]) == [[27, 91, 437, 1659, 5239, 91, 29]]


def test_engines_agree_on_random_text(gigatoken_encoder, reference_encoder):
    generator = np.random.default_rng(0)
    alphabet = [*list("aàβж中🙂 \n\t'0.<|"), "<|endoftext|>", "'ll", "  ", "ing", " the", "\xa0", "\r\n"]
    texts = ["".join(generator.choice(alphabet, generator.integers(0, 60))) for _ in range(300)]
    assert encode(gigatoken_encoder, texts) == encode(reference_encoder, texts)


def test_encodes_a_slice_of_an_array(gigatoken_encoder):
    texts = pa.array(["one", "two words", "three", "four"], pa.large_string())
    tokens, offsets = dataclasses.replace(gigatoken_encoder).encode(texts[1:3])
    assert [tokens[: offsets[1]].tolist(), tokens[offsets[1] :].tolist()] == encode(
        gigatoken_encoder, ["two words", "three"]
    )


def test_rebuilt_engine_gives_the_same_ids(gigatoken_encoder, monkeypatch):
    texts = [f"word{i} " * 20 for i in range(50)]
    expected = encode(gigatoken_encoder, texts)
    monkeypatch.setattr(encoding, "ENGINE_BYTES", 18_000)
    monkeypatch.setattr(encoding, "measure_private_memory", lambda: None)  # as on systems other than Linux
    encoder = dataclasses.replace(gigatoken_encoder)
    engines = set()
    for text, ids in zip(texts, expected, strict=True):
        assert encoder.encode(pa.array([text], pa.large_string()))[0].tolist() == ids
        engines.add(encoder._engine)
    assert len(engines) > 1


def measure_growth(encoder: DocumentEncoder) -> int:
    """Return the peak growth of this process's memory while encoding five million distinct words, in bytes."""
    letters = np.random.default_rng(0).integers(97, 123, (5_000_000, 8), dtype=np.uint8)
    letters[:, 0] = 32
    texts = [words.tobytes().decode() for words in np.array_split(letters, 50)]
    before = measure_private_memory()
    growth = []
    for text in texts:
        encoder.encode(pa.array([text], pa.large_string()))
        growth.append(measure_private_memory() - before)
    return max(growth)


@pytest.mark.heavy
@pytest.mark.skipif(measure_private_memory() is None, reason="reads /proc, which only Linux has")
def test_an_endless_stream_of_new_words_takes_bounded_memory(gigatoken_encoder):
    # In a new process, without freed memory for the engine to grow into.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        growth = pool.apply(measure_growth, (gigatoken_encoder,))
    assert 20e6 < growth < 250e6  # 350e6 and rising if nothing is evicted


@pytest.mark.skipif(measure_private_memory() is None, reason="reads /proc, which only Linux has")
def test_memory_used_elsewhere_does_not_reset_the_engine(gigatoken_encoder):
    encoder = dataclasses.replace(gigatoken_encoder)
    engine, held = encoder._engine, []
    for text in ("one", "two", "three"):
        held.append(np.ones(encoding.ENGINE_BYTES, np.uint8))
        encoder.encode(pa.array([text], pa.large_string()))
    assert encoder._engine is engine


def test_an_encoder_can_be_pickled(gigatoken_encoder):
    encoder = pickle.loads(pickle.dumps(gigatoken_encoder))
    assert encoder.encode(pa.array(["Hello world"], pa.large_string()))[0].tolist() == PUBLISHED["Hello world"]


def test_different_engines_stop_the_run(gigatoken_encoder, monkeypatch):
    monkeypatch.setattr(DocumentEncoder, "_encode_slowly", lambda self, documents: (np.array([64]), np.array([0, 1])))
    with pytest.raises(UserError, match="differently"):
        check_engines_agree(dataclasses.replace(gigatoken_encoder), "gpt2")


def test_an_encoder_leaves_the_tokenizer_as_it_was(tokenizer):
    build_encoder(tokenizer, "gpt2")
    assert tokenizer("a<|endoftext|>")["input_ids"] == [64, 50256]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request) -> PreTrainedTokenizerFast:
    return FAMILIES[request.param]()


def list_forgeries(tokenizer) -> list[str]:
    """Return texts that spell special tokens: alone, in text, unspaced, broken up, and formed by a normalizer."""
    tokens = [str(token) for token in tokenizer.added_tokens_encoder] + [tokenizer.eos_token]
    spellings = [
        *tokens,
        "\uff1c\uff0f\uff53\uff1e",
        "</S>",
        "</s\u0301>",
        "@END@",
        *(token.upper() for token in tokens),
    ]
    generator = np.random.default_rng(0)
    alphabet = [*spellings, *"".join(tokens), *" \n▁", "the text", "##", "Ġ", "</w>"]
    drawn = ["".join(generator.choice(alphabet, generator.integers(2, 9))) for _ in range(300)]
    return [*spellings, *(f"the {spelling} of{spelling}{spelling}" for spelling in spellings), *drawn]


def test_no_text_encodes_to_a_special_token(family):
    forgeries = list_forgeries(family)
    special = {index for index, token in family.added_tokens_decoder.items() if token.special}
    # The tokenizer itself does not prevent it.
    assert family.eos_token_id in {*family(f"the {family.eos_token} of")["input_ids"]}
    for text, ids in zip(forgeries, encode(build_encoder(family, "tiny"), forgeries), strict=True):
        assert family.eos_token_id not in ids, text
        assert special.isdisjoint({*ids} - {family.unk_token_id}), text


def test_text_without_special_tokens_keeps_its_ids(family):
    tokens = [token.lower() for token in {*family.added_tokens_encoder, family.eos_token} - {"  "}]
    texts = [*LINES, *ODD_SAMPLE, "the text ends", "s> </", "<s <un", "  ", "a  b"]
    texts = [text for text in texts if not any(token in text.lower() for token in tokens)]
    options = {"add_special_tokens": False, "split_special_tokens": True, "truncation": False, "padding": False}
    expected = [family(text, **options)["input_ids"] for text in texts]
    assert encode(build_encoder(family, "tiny"), texts) == expected


def build_unknown_ends() -> list[Tokenizer]:
    words = {"<end>": 0, "a": 1}
    pieces = [("<end>", 0.0), ("a", -1.0)]
    return [
        Tokenizer(models.WordLevel(words, unk_token="<end>")),
        Tokenizer(models.WordPiece(words, unk_token="<end>")),
        Tokenizer(models.BPE(words, [], unk_token="<end>")),
        Tokenizer(models.Unigram(pieces, unk_id=0)),
    ]


@pytest.mark.parametrize("backend", build_unknown_ends(), ids=lambda backend: type(backend.model).__name__)
def test_an_end_of_text_token_that_is_the_unknown_token_is_rejected(backend):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")
    with pytest.raises(UserError, match="unk_token"):
        build_encoder(tokenizer, "words")
    definition = json.dumps(define_text_encoding(tokenizer))
    with pytest.raises(UserError, match="unk_token"):  # and the id is rejected if a text yields it all the same
        encode(DocumentEncoder(definition, 0, uses_gigatoken=False), ["a", "b"])


def test_an_end_of_text_token_that_text_needs_is_rejected(tokenizer):
    exclaiming = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="!")
    with pytest.raises(UserError, match="'!'"):
        build_encoder(exclaiming, "exclaiming")


@pytest.mark.parametrize("eos_token", ["\n", "<end>"])
def test_an_end_of_text_token_that_becomes_unknown_text_is_reported(capsys, eos_token):
    words = Tokenizer(models.WordLevel({"<unk>": 0, eos_token: 1, "a": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split("a", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token=eos_token)
    assert encode(build_encoder(tokenizer, "words"), [f"a{eos_token}a"]) == [[2, 0, 2]]
    assert f"encodes {eos_token!r}" in capsys.readouterr().out


def test_ids_with_gaps_are_rejected():
    words = Tokenizer(models.WordLevel({"a": 0, "<end>": 1, "b": 65_537}, unk_token="a"))
    with pytest.raises(UserError, match="has gaps in its ids"):
        build_encoder(PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>"), "words")


def test_text_that_has_no_tokens_is_explained():
    words = Tokenizer(models.WordLevel({"a": 0, "<end>": 1}, unk_token="none"))
    encoder = build_encoder(PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>"), "words")
    assert encode(encoder, ["a"]) == [[0]]
    with pytest.raises(UnknownTextError, match="cannot encode a text"):
        encode(encoder, ["b"])


def test_special_tokens_of_one_character_or_byte_are_kept():
    vocabulary = {"<end>": 0, "a": 1, "\n": 2, **{f"<0x{byte:02X}>": 3 + byte for byte in range(256)}}
    backend = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    backend.add_special_tokens(["\n", "<0x0D>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")
    assert encode(build_encoder(tokenizer, "bytes"), ["a\n\r"]) == [[1, 2, 3 + 13]]


def test_truncation_padding_and_templates_are_ignored(tokenizer):
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.enable_truncation(2)
    backend.enable_padding(length=50)
    backend.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A <|endoftext|>", special_tokens=[("<|endoftext|>", 50256)]
    )
    framing = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    encoder = build_encoder(framing, "framing")
    assert encoder.uses_gigatoken
    reference = dataclasses.replace(encoder, uses_gigatoken=False)
    expected = [PUBLISHED["Hello, I'm a language model,"]]
    assert encode(encoder, ["Hello, I'm a language model,"]) == expected
    assert encode(reference, ["Hello, I'm a language model,"]) == expected


def test_bytes_of_a_small_tokenizer():
    alphabet = GPT2TokenizerFast().backend_tokenizer.pre_tokenizer.alphabet()
    vocabulary = {symbol: index for index, symbol in enumerate(sorted(alphabet))} | {"<|endoftext|>": 256}
    encoder = build_encoder(GPT2TokenizerFast(vocab=vocabulary, merges=[]), "bytes")
    (ids,) = encode(encoder, ["ä<|endoftext|>"])
    assert len(ids) == 2 + len("<|endoftext|>")


def test_too_large_vocabulary_is_rejected():
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(65_537)}, unk_token="w0"))
    large = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1")
    with pytest.raises(UserError, match="65,536"):
        build_encoder(large, "large")


def test_tokenizer_without_end_of_text_is_rejected():
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(UserError, match="eos_token"):
        build_encoder(words, "words")


def test_a_tokenizer_unknown_to_gigatoken_falls_back_with_a_notice(capsys):
    words = Tokenizer(models.WordLevel({"a": 0, "<end>": 1}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>")
    encoder = build_encoder(tokenizer, "words")
    assert not encoder.uses_gigatoken
    assert capsys.readouterr().out.startswith("gigatoken does not support words")
    assert encode(encoder, ["a"]) == [[0]]
