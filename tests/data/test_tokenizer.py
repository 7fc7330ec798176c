"""Tokenizers: published ids, loading without added tokens, spellings, and fingerprints."""

import json
import subprocess
import sys

import numpy as np
import pytest
from published_ids import PUBLISHED
from tiny_tokenizers import FAMILIES, LINES
from tokenizers import Tokenizer, decoders, models, processors
from transformers import AutoTokenizer, GPT2TokenizerFast, PreTrainedTokenizerFast

from modeling_gpt2_repro.core.errors import UserError
from modeling_gpt2_repro.data.tokenizer import (
    fingerprint_tokenizer,
    load_tokenizer,
    make_plain,
    spell_tokens,
    token_byte_lengths,
)


@pytest.mark.parametrize("name", ["openai-community/gpt2", "gpt2"])
def test_loads_the_published_gpt2(name):
    tokenizer = load_tokenizer(name)
    assert len(tokenizer) == 50257
    assert tokenizer.eos_token_id == 50256
    assert {text: tokenizer(text)["input_ids"] for text in PUBLISHED} == PUBLISHED


PLAIN_TEXTS = [
    *LINES[:4],
    "",
    "  two  spaces ",
    " I 'm . a ,b !",
    "naïve 日本語",
    "the <s> </s> <|endoftext|> [SEP] x",
]


def describe_encoding(tokenizer) -> dict:
    """Return what users of a tokenizer, or of its `tokenizer.json` alone, get."""
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
    """Return the `describe_encoding` expected of a tokenizer that adds no tokens, from one that may add some."""
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


# The model configurations beside a tokenizer: a stock model's, our checkpoints', and none.
CONFIGS = {"final": {"model_type": "gpt2"}, "checkpoint": {"model_type": "gpt2_repro"}, "alone": None}


@pytest.mark.heavy
def test_a_loaded_tokenizer_adds_nothing_and_saves_one_that_adds_nothing(tmp_path):
    """Check this process, and each kind of folder that we write in a process that does not import the package."""
    ideals, names = {}, [name for name in FAMILIES if name != "plain_added_end"]  # its end-of-text token is not saved
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
def test_tokenizer_classes_do_not_add_their_tokens_again(tmp_path, name, template, begins, own_class):
    """The classes follow the template in `tokenizer.json`, `add_bos_token`, or both."""
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
    """SentencePiece's: a space is a separate underscore, and a byte without a token is spelled in hexadecimal."""
    vocabulary = {"<s>": 0, "<0xE2>": 1, "▁the": 2, "the": 3}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="the"))
    backend.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<s>")
    assert spell_tokens(tokenizer, range(4)) == [b"<s>", b"\xe2", b" the", b"the"]
    assert token_byte_lengths(tokenizer).tolist() == [0, 1, 4, 3]


def test_fingerprint_depends_on_the_vocabulary_not_on_the_path(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    assert fingerprint_tokenizer(load_tokenizer(str(tmp_path))) == fingerprint_tokenizer(tokenizer)


def test_fingerprint_changes_with_merges_and_eot(tokenizer):
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    definition["model"]["merges"][0], definition["model"]["merges"][1] = definition["model"]["merges"][1::-1]
    swapped = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(definition)), eos_token="<|endoftext|>"
    )
    other_eot = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="!")
    assert len({fingerprint_tokenizer(each) for each in (tokenizer, swapped, other_eot)}) == 3


def test_small_local_tokenizer(tmp_path):
    alphabet = GPT2TokenizerFast().backend_tokenizer.pre_tokenizer.alphabet()
    vocabulary = {symbol: index for index, symbol in enumerate(sorted(alphabet))} | {"<|endoftext|>": 256}
    GPT2TokenizerFast(vocab=vocabulary, merges=[]).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    assert len(tokenizer("ä<|endoftext|>", split_special_tokens=True)["input_ids"]) == 2 + len("<|endoftext|>")
    assert token_byte_lengths(tokenizer).tolist() == [1] * 256 + [0]


@pytest.mark.parametrize("name", ["no-such-user/no-such-tokenizer", "./no/such/folder"])
def test_a_missing_tokenizer_is_explained(name):
    with pytest.raises(UserError, match="check the name"):
        load_tokenizer(name)


def test_folder_without_tokenizer(tmp_path):
    with pytest.raises(UserError, match="contains no tokenizer"):
        load_tokenizer(str(tmp_path))


def test_a_folder_with_only_a_model_config_has_no_tokenizer(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(UserError, match="contains no tokenizer"):
        load_tokenizer(str(tmp_path))
