"""Tokenizers: the published ids, ordinary text, one engine as good as the other."""

import dataclasses
import itertools
import json
import multiprocessing
import pickle
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
from tiny_tokenizers import FAMILIES, LINES
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, GPT2TokenizerFast, PreTrainedTokenizerFast

from modeling_gpt2_repro.core.devices import measure_private_memory
from modeling_gpt2_repro.core.errors import UserError
from modeling_gpt2_repro.data import tokenizer
from modeling_gpt2_repro.data.tokenizer import (
    DocumentEncoder,
    EncoderSpec,
    UnknownTextError,
    build_encoder,
    check_engines_agree,
    define_text_encoding,
    fingerprint_tokenizer,
    load_tokenizer,
    make_plain,
    spell_tokens,
    token_byte_lengths,
)


@pytest.fixture(scope="module")
def gigatoken_spec(tokenizer):
    spec = build_encoder(tokenizer, "gpt2").spec
    assert spec.uses_gigatoken
    return spec


@pytest.fixture(scope="module")
def reference_spec(gigatoken_spec):
    return dataclasses.replace(gigatoken_spec, uses_gigatoken=False)


def encode(spec, texts):
    tokens, offsets = DocumentEncoder(spec).encode(pa.array(texts, pa.large_string()))
    assert tokens.dtype == np.uint16
    return [tokens[start:end].tolist() for start, end in itertools.pairwise(offsets)]


PUBLISHED = {
    "Hello, I'm a language model,": [15496, 11, 314, 1101, 257, 3303, 2746, 11],
    "Hello world": [15496, 995],
    " the": [262],
    "\n\n": [628],
    "": [],
}


@pytest.mark.parametrize("name", ["openai-community/gpt2", "gpt2"])
def test_loads_the_published_gpt2(name):
    tokenizer = load_tokenizer(name)
    assert len(tokenizer) == 50257
    assert tokenizer.eos_token_id == 50256
    assert {text: tokenizer(text)["input_ids"] for text in PUBLISHED} == PUBLISHED


@pytest.mark.parametrize("engine", ["gigatoken_spec", "reference_spec"])
def test_encodes_published_ids(engine, request):
    assert encode(request.getfixturevalue(engine), list(PUBLISHED)) == list(PUBLISHED.values())


@pytest.mark.parametrize("engine", ["gigatoken_spec", "reference_spec"])
def test_special_token_in_text_stays_text(engine, request):
    assert encode(request.getfixturevalue(engine), ["<|endoftext|>"]) == [[27, 91, 437, 1659, 5239, 91, 29]]


def test_engines_agree_on_random_text(gigatoken_spec, reference_spec):
    generator = np.random.default_rng(0)
    alphabet = [*list("aàβж中🙂 \n\t'0.<|"), "<|endoftext|>", "'ll", "  ", "ing", " the", "\xa0", "\r\n"]
    texts = ["".join(generator.choice(alphabet, generator.integers(0, 60))) for _ in range(300)]
    assert encode(gigatoken_spec, texts) == encode(reference_spec, texts)


def test_encodes_a_slice_of_an_array(gigatoken_spec):
    texts = pa.array(["one", "two words", "three", "four"], pa.large_string())
    tokens, offsets = DocumentEncoder(gigatoken_spec).encode(texts[1:3])
    assert [tokens[: offsets[1]].tolist(), tokens[offsets[1] :].tolist()] == encode(
        gigatoken_spec, ["two words", "three"]
    )


def test_rebuilt_engine_gives_the_same_ids(gigatoken_spec, monkeypatch):
    texts = [f"word{i} " * 20 for i in range(50)]
    expected = encode(gigatoken_spec, texts)
    monkeypatch.setattr(tokenizer, "ENGINE_BYTES", 18_000)
    monkeypatch.setattr(tokenizer, "measure_private_memory", lambda: None)  # as elsewhere than on Linux
    encoder = DocumentEncoder(gigatoken_spec)
    engines = set()
    for text, ids in zip(texts, expected, strict=True):
        assert encoder.encode(pa.array([text], pa.large_string()))[0].tolist() == ids
        engines.add(encoder._engine)
    assert len(engines) > 1


def measure_growth(spec: EncoderSpec) -> int:
    """Return by how much encoding five million words, no two of them alike, makes this process grow at most."""
    encoder = DocumentEncoder(spec)
    letters = np.random.default_rng(0).integers(97, 123, (5_000_000, 8), dtype=np.uint8)
    letters[:, 0] = 32
    texts = [words.tobytes().decode() for words in np.array_split(letters, 50)]
    before = measure_private_memory()
    growth = []
    for text in texts:
        encoder.encode(pa.array([text], pa.large_string()))
        growth.append(measure_private_memory() - before)
    return max(growth)


@pytest.mark.skipif(measure_private_memory() is None, reason="a process sees its own memory on Linux only")
def test_ever_new_words_take_bounded_memory(gigatoken_spec):
    # In a process of its own, which has no free memory from before for the engine to grow into.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        growth = pool.apply(measure_growth, (gigatoken_spec,))
    assert 20e6 < growth < 250e6  # 350e6 and rising where nothing is forgotten


@pytest.mark.skipif(measure_private_memory() is None, reason="a process sees its own memory on Linux only")
def test_memory_of_others_does_not_cost_the_engine_its_words(gigatoken_spec):
    encoder = DocumentEncoder(gigatoken_spec)
    engine, held = encoder._engine, []
    for text in ("one", "two", "three"):
        held.append(np.ones(tokenizer.ENGINE_BYTES, np.uint8))
        encoder.encode(pa.array([text], pa.large_string()))
    assert encoder._engine is engine


def test_an_encoder_travels_to_another_process(gigatoken_spec):
    encoder = pickle.loads(pickle.dumps(DocumentEncoder(gigatoken_spec)))
    assert encoder.encode(pa.array(["Hello world"], pa.large_string()))[0].tolist() == PUBLISHED["Hello world"]


def test_different_engines_stop_the_run(gigatoken_spec, monkeypatch):
    monkeypatch.setattr(DocumentEncoder, "_encode_slowly", lambda self, documents: (np.array([64]), np.array([0, 1])))
    with pytest.raises(UserError, match="differently"):
        check_engines_agree(DocumentEncoder(gigatoken_spec), "gpt2")


def test_an_encoder_leaves_the_tokenizer_as_it_was(tokenizer):
    build_encoder(tokenizer, "gpt2")
    assert tokenizer("a<|endoftext|>")["input_ids"] == [64, 50256]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request) -> PreTrainedTokenizerFast:
    return FAMILIES[request.param]()


def list_forgeries(tokenizer) -> list[str]:
    """Texts that spell special tokens: alone, in a text, glued to it, broken up, and as a normalizer makes them."""
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


def test_no_text_makes_a_special_token(family):
    forgeries = list_forgeries(family)
    special = {index for index, token in family.added_tokens_decoder.items() if token.special}
    assert family.eos_token_id in {*family(f"the {family.eos_token} of")["input_ids"]}  # where nobody sees to it
    for text, ids in zip(forgeries, encode(build_encoder(family, "tiny").spec, forgeries), strict=True):
        assert family.eos_token_id not in ids, text
        assert special.isdisjoint({*ids} - {family.unk_token_id}), text


def test_what_spells_no_special_token_keeps_its_ids(family):
    tokens = [token.lower() for token in {*family.added_tokens_encoder, family.eos_token} - {"  "}]
    texts = [*LINES, *tokenizer.ODD_SAMPLE, "the text ends", "s> </", "<s <un", "  ", "a  b"]
    texts = [text for text in texts if not any(token in text.lower() for token in tokens)]
    options = {"add_special_tokens": False, "split_special_tokens": True, "truncation": False, "padding": False}
    expected = [family(text, **options)["input_ids"] for text in texts]
    assert encode(build_encoder(family, "tiny").spec, texts) == expected


PLAIN_TEXTS = [
    *LINES[:4],
    "",
    "  two  spaces ",
    " I 'm . a ,b !",
    "naïve 日本語",
    "the <s> </s> <|endoftext|> [SEP] x",
]


def describe_encoding(tokenizer) -> dict:
    """What a user of a tokenizer, or of its `tokenizer.json` alone, gets."""
    backend = tokenizer.backend_tokenizer
    return {
        "encodings": [dict(tokenizer(text)) for text in PLAIN_TEXTS],
        "pair": tokenizer("the text", "a text")["input_ids"],
        "backend": [backend.encode(text).ids for text in PLAIN_TEXTS],
        "decoded": [tokenizer.decode(tokenizer(text)["input_ids"]) for text in PLAIN_TEXTS],
        "skipped": [tokenizer.decode(backend.encode(t).ids, skip_special_tokens=True) for t in PLAIN_TEXTS],
        "fingerprint": fingerprint_tokenizer(tokenizer),
        "special": tokenizer.special_tokens_map,
        "end": tokenizer.eos_token_id,
    }


def describe_ideal(tokenizer) -> dict:
    """What `describe_encoding` has to give of the tokenizer that adds nothing, by one that may."""
    options = {"add_special_tokens": False, "truncation": False, "padding": False}
    ids = [tokenizer(text, **options)["input_ids"] for text in PLAIN_TEXTS]
    return {
        "encodings": [{"input_ids": row, "attention_mask": [1] * len(row)} for row in ids],
        "pair": tokenizer("the text", "a text", **options)["input_ids"],
        "backend": ids,
        "decoded": [tokenizer.decode(row) for row in ids],
        "skipped": [tokenizer.decode(row, skip_special_tokens=True) for row in ids],
        "fingerprint": fingerprint_tokenizer(tokenizer),
        "special": tokenizer.special_tokens_map,
        "end": tokenizer.eos_token_id,
    }


# As people have them, and as a model folder of ours says of itself.
CONFIGS = {"final": {"model_type": "gpt2"}, "checkpoint": {"model_type": "gpt2_repro"}, "alone": None}


def test_a_loaded_tokenizer_adds_nothing_and_saves_one_that_adds_nothing(tmp_path):
    """In this process, and from each kind of folder that we write in one that has nothing of ours."""
    ideals, names = {}, [name for name in FAMILIES if name != "plain_added_end"]  # whose end is not saved
    for name in names:
        FAMILIES[name]().save_pretrained(tmp_path / name)
        ideals[name] = describe_ideal(AutoTokenizer.from_pretrained(tmp_path / name))
        tokenizer = load_tokenizer(str(tmp_path / name))
        assert describe_encoding(tokenizer) == ideals[name], name
        for kind, config in CONFIGS.items():
            tokenizer.save_pretrained(tmp_path / f"{name}-{kind}")
            if config is not None:
                (tmp_path / f"{name}-{kind}" / "config.json").write_text(json.dumps(config))
    script = (
        "import json, sys; from transformers import AutoTokenizer\n"
        "for line in sys.stdin:\n"
        "    folder, texts = json.loads(line)\n"
        "    tokenizer = AutoTokenizer.from_pretrained(folder)\n"
        "    print(json.dumps([dict(tokenizer(text)) for text in texts]))\n"
    )
    cases = [(name, kind) for name in names for kind in CONFIGS]
    lines = "".join(json.dumps([str(tmp_path / f"{name}-{kind}"), PLAIN_TEXTS]) + "\n" for name, kind in cases)
    fresh = subprocess.run([sys.executable, "-c", script], input=lines, capture_output=True, text=True, check=True)
    for (name, kind), line in zip(cases, fresh.stdout.splitlines(), strict=True):
        assert json.loads(line) == ideals[name]["encodings"], (name, kind)


@pytest.mark.parametrize("own_class", [True, False])
@pytest.mark.parametrize("begins", [None, True, False])
@pytest.mark.parametrize("template", ["<s> $A", "$A", None])
@pytest.mark.parametrize("name", ["llama", "gemma", "gpt_neox"])
def test_classes_do_not_put_their_tokens_back(tmp_path, name, template, begins, own_class):
    """Theirs go by what `tokenizer.json` says, by `add_bos_token`, or by both."""
    built = FAMILIES[name]()
    built.save_pretrained(tmp_path)
    first = (built.bos_token, built.bos_token_id)
    definition = json.loads((tmp_path / "tokenizer.json").read_text())
    if template is not None:
        single = template.replace("<s>", first[0])
        processor = processors.TemplateProcessing(single, f"{single} $B", [first])
        definition["post_processor"] = json.loads(processor.__getstate__())
    else:
        definition["post_processor"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    config = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"add_bos_token": begins}
    config = {key: value for key, value in config.items() if key != "add_bos_token" or begins is not None}
    if not own_class:
        config["tokenizer_class"] = "TokenizersBackend"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ideal = describe_ideal(AutoTokenizer.from_pretrained(tmp_path))
    tokenizer = load_tokenizer(str(tmp_path))
    tokenizer.save_pretrained(tmp_path / "saved")
    assert describe_encoding(tokenizer) == ideal
    assert describe_encoding(AutoTokenizer.from_pretrained(tmp_path / "saved")) == ideal


def test_a_tokenizer_that_adds_nothing_stays_as_it_is(tokenizer):
    assert make_plain(tokenizer) is tokenizer
    assert type(tokenizer) is GPT2TokenizerFast


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
def test_an_end_of_text_token_for_unknown_text_is_refused(backend):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")
    with pytest.raises(UserError, match="unk_token"):
        build_encoder(tokenizer, "words")
    definition = json.dumps(define_text_encoding(tokenizer))
    with pytest.raises(UserError, match="unk_token"):  # nor do shards get the id if a text has it all the same
        encode(EncoderSpec(definition, 0, uses_gigatoken=False), ["a", "b"])


def test_an_end_of_text_token_that_text_cannot_do_without_is_refused(tokenizer):
    exclaiming = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="!")
    with pytest.raises(UserError, match="'!'"):
        build_encoder(exclaiming, "exclaiming")


@pytest.mark.parametrize("eos_token", ["\n", "<end>"])
def test_an_end_of_text_token_that_becomes_unknown_text_is_told(capsys, eos_token):
    words = Tokenizer(models.WordLevel({"<unk>": 0, eos_token: 1, "a": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split("a", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token=eos_token)
    assert encode(build_encoder(tokenizer, "words").spec, [f"a{eos_token}a"]) == [[2, 0, 2]]
    assert f"takes {eos_token!r} in a text" in capsys.readouterr().out


def test_ids_with_gaps_are_refused():
    words = Tokenizer(models.WordLevel({"a": 0, "<end>": 1, "b": 65_537}, unk_token="a"))
    with pytest.raises(UserError, match="leaves ids out"):
        build_encoder(PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>"), "words")


def test_a_text_without_tokens_for_it_is_explained():
    words = Tokenizer(models.WordLevel({"a": 0, "<end>": 1}, unk_token="none"))
    spec = build_encoder(PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>"), "words").spec
    assert encode(spec, ["a"]) == [[0]]
    with pytest.raises(UnknownTextError, match="no tokens"):
        encode(spec, ["b"])


def test_single_characters_and_bytes_stay_what_they_are_if_they_are_special():
    vocabulary = {"<end>": 0, "a": 1, "\n": 2, **{f"<0x{byte:02X}>": 3 + byte for byte in range(256)}}
    backend = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    backend.add_special_tokens(["\n", "<0x0D>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")
    assert encode(build_encoder(tokenizer, "bytes").spec, ["a\n\r"]) == [[1, 2, 3 + 13]]


def test_byte_lengths_add_up_to_the_text(tokenizer):
    lengths = token_byte_lengths(tokenizer)
    assert lengths.shape == (50257,)
    assert lengths[50256] == 0
    for text in ("plain", "naïve 日本語 🙂 " * 3, "\x00\x7f \u2028"):
        assert lengths[tokenizer(text)["input_ids"]].sum() == len(text.encode())


def test_spells_parts_of_characters_and_special_tokens(tokenizer):
    text = "it\u2019s naïve 日本語 🙂\x00\n  x"
    ids = tokenizer(text)["input_ids"]
    assert b"".join(spell_tokens(tokenizer, ids)) == text.encode()
    spellings = spell_tokens(tokenizer, np.array([447, 247, 262, 50256]))
    assert spellings == [b"\xe2\x80", b"\x99", b" the", b"<|endoftext|>"]


def test_spells_tokens_of_other_families():
    """SentencePiece's: a space is an underscore of its own, a byte without a token is spelled in hexadecimal."""
    vocabulary = {"<s>": 0, "<0xE2>": 1, "▁the": 2, "the": 3}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="the"))
    backend.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<s>")
    assert spell_tokens(tokenizer, range(4)) == [b"<s>", b"\xe2", b" the", b"the"]
    assert token_byte_lengths(tokenizer).tolist() == [0, 1, 4, 3]


def test_nothing_is_cut_or_put_around_a_document(tokenizer):
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.enable_truncation(2)
    backend.enable_padding(length=50)
    backend.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A <|endoftext|>", special_tokens=[("<|endoftext|>", 50256)]
    )
    framing = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    spec = build_encoder(framing, "framing").spec
    assert spec.uses_gigatoken
    reference = dataclasses.replace(spec, uses_gigatoken=False)
    expected = [PUBLISHED["Hello, I'm a language model,"]]
    assert encode(spec, ["Hello, I'm a language model,"]) == expected
    assert encode(reference, ["Hello, I'm a language model,"]) == expected


def test_fingerprint_is_of_the_vocabulary_not_of_the_place(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    assert fingerprint_tokenizer(load_tokenizer(str(tmp_path))) == fingerprint_tokenizer(tokenizer)


def test_fingerprint_sees_another_merge_or_eot(tokenizer):
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    definition["model"]["merges"][0], definition["model"]["merges"][1] = definition["model"]["merges"][1::-1]
    swapped = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(definition)), eos_token="<|endoftext|>"
    )
    other_eot = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="!")
    assert len({fingerprint_tokenizer(each) for each in (tokenizer, swapped, other_eot)}) == 3


def test_too_large_vocabulary_is_refused():
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(65_537)}, unk_token="w0"))
    large = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1")
    with pytest.raises(UserError, match="65,536"):
        build_encoder(large, "large")


def test_tokenizer_without_end_of_text_is_refused():
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(UserError, match="eos_token"):
        build_encoder(words, "words")


def test_tokenizer_unknown_to_gigatoken_uses_the_reference_and_says_so(capsys):
    words = Tokenizer(models.WordLevel({"a": 0, "<end>": 1}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>")
    spec = build_encoder(tokenizer, "words").spec
    assert not spec.uses_gigatoken
    assert capsys.readouterr().out.startswith("gigatoken cannot take the tokenizer words")
    assert encode(spec, ["a"]) == [[0]]


def test_small_local_tokenizer(tmp_path):
    alphabet = GPT2TokenizerFast().backend_tokenizer.pre_tokenizer.alphabet()
    vocabulary = {symbol: index for index, symbol in enumerate(sorted(alphabet))} | {"<|endoftext|>": 256}
    GPT2TokenizerFast(vocab=vocabulary, merges=[]).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    spec = build_encoder(tokenizer, "bytes").spec
    (ids,) = encode(spec, ["ä<|endoftext|>"])
    assert len(ids) == 2 + len("<|endoftext|>")
    assert token_byte_lengths(tokenizer).tolist() == [1] * 256 + [0]


@pytest.mark.parametrize("name", ["no-such-user/no-such-tokenizer", "./no/such/folder"])
def test_missing_tokenizer_says_what_to_do(name):
    with pytest.raises(UserError, match="check the name"):
        load_tokenizer(name)


def test_folder_without_tokenizer(tmp_path):
    with pytest.raises(UserError, match="holds no tokenizer"):
        load_tokenizer(str(tmp_path))


def test_a_folder_with_a_models_configuration_alone_is_no_tokenizer(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(UserError, match="holds no tokenizer"):
        load_tokenizer(str(tmp_path))
