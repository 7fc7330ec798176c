"""HellaSwag's two protocols: the tokens that a model reads, and the lengths that its scores are divided by."""

from types import SimpleNamespace

import pytest

from modeling_gpt2_repro.core import devices
from modeling_gpt2_repro.core.errors import UserError
from modeling_gpt2_repro.evaluation import hellaswag_protocols
from modeling_gpt2_repro.evaluation.hellaswag_data import SAMPLE_FILE, HellaSwagItem, load_hellaswag
from modeling_gpt2_repro.evaluation.hellaswag_protocols import (
    HellaSwagQuestions,
    encode_hellaswag,
    render_lm_eval,
    render_original,
)


@pytest.fixture(scope="module")
def sample():
    return load_hellaswag(SAMPLE_FILE)


def make_item(
    ctx_a="A dog runs.", ctx_b="it", endings=("barks.", "sings.", "melts.", "folds."), activity_label="Dogs"
):
    ctx = f"{ctx_a} {ctx_b}".strip()
    return HellaSwagItem(3, activity_label, ctx_a, ctx_b, ctx, tuple(endings), label=1)


def test_original_reads_the_raw_context_and_counts_tokens(tokenizer):
    item = make_item(ctx_a="[header] Two  blanks [title] x", ctx_b="", endings=("[step] a", "b  c", "d", "e"))
    context, continuations = render_original(item)
    assert (context, continuations[0]) == ("[header] Two  blanks [title] x", " [step] a")
    encoded = encode_hellaswag([item], tokenizer, "original").items[0]
    assert tokenizer.decode(encoded.context_ids) == context
    assert [tokenizer.decode(ids) for ids in encoded.ending_ids] == continuations
    assert encoded.ending_lengths == tuple(len(ids) for ids in encoded.ending_ids)


# lm-evaluation-harness 0.4.13's output for the same fields: context, continuations, characters of each ending.
LM_EVAL_CASES = {
    "caption": (
        make_item(),
        "Dogs: A dog runs. It",
        [" barks.", " sings.", " melts.", " folds."],
        (6, 6, 6, 6),
    ),
    "marks": (
        make_item(
            "[header] How to x [title] Do y. [step] Do z.", "", ("[title] A. [step] B", "c [title] d", "e", "f")
        ),
        "Dogs: How to x. Do y. Do z.",
        ["  A. B", " c. d", " e", " f"],
        (5, 4, 1, 1),
    ),
    "blanks": (
        make_item("Three   blanks", "hE SAYS", ("a   b", " c  d ", "e [x] [y] f", "[step]")),
        "Dogs: Three  blanks He says",
        [" a  b", " c d", " e  f", " "],
        (4, 3, 4, 0),
    ),
    "final mark": (
        make_item("How to x. Then [step]", "", ("a", "b", "c", "d")),
        "Dogs: How to x. Then",
        ["  a", "  b", "  c", "  d"],
        (1, 1, 1, 1),
    ),
    "two final marks": (
        make_item("ends [a] [b]", "", ("a", "b", "c", "d")),
        "Dogs: ends",
        ["  a", "  b", "  c", "  d"],
        (1, 1, 1, 1),
    ),
    "open marks": (
        make_item("No [end\nof] x", "", ("a [b\nc] d", "e\n", "f]", "[g")),
        "Dogs: No [end\nof] x",
        [" a [b\nc] d", " e", " f]", " [g"],
        (9, 1, 2, 2),
    ),
}


@pytest.mark.parametrize(("item", "context", "continuations", "lengths"), LM_EVAL_CASES.values(), ids=LM_EVAL_CASES)
def test_lm_eval_cleans_and_encodes_like_the_harness(tokenizer, item, context, continuations, lengths):
    assert render_lm_eval(item) == (context, continuations)
    encoded = encode_hellaswag([item], tokenizer, "lm_eval").items[0]
    assert encoded.ending_lengths == lengths
    assert encoded.context_ids == tokenizer(context)["input_ids"]
    for ids, continuation in zip(encoded.ending_ids, continuations, strict=True):
        assert encoded.context_ids + ids == tokenizer(context + continuation)["input_ids"]


def split_in_pairs(text):
    return [text[start : start + 2] for start in range(0, len(text), 2)]


def test_lm_eval_encodes_context_and_ending_together():
    class PairTokenizer:
        """Joins characters in pairs, so a text's tokens depend on where it begins."""

        def __call__(self, texts, **_):
            return {"input_ids": [[int.from_bytes(pair) for pair in split_in_pairs(text.encode())] for text in texts]}

    tokenizer, item = PairTokenizer(), make_item(ctx_b="its")
    context, continuations = render_lm_eval(item)
    assert len(context) % 2 == 1
    whole_ids = tokenizer([context + continuations[0]])["input_ids"][0]
    encoded = encode_hellaswag([item], tokenizer, "lm_eval").items[0]
    assert encoded.ending_ids[0] == whole_ids[(len(context) + 1) // 2 :]


@pytest.mark.parametrize("protocol", ["original", "lm_eval"])
def test_all_items_are_encoded_in_a_few_calls(tokenizer, sample, protocol, monkeypatch):
    monkeypatch.setattr(hellaswag_protocols, "ITEMS_PER_ENCODING", 20)
    calls = []

    def count(texts, **options):
        calls.append(len(texts))
        return tokenizer(texts, **options)

    encoded = encode_hellaswag(sample, count, protocol)
    assert calls == [100, 100, 40]
    assert encoded.items == sum((encode_hellaswag([item], tokenizer, protocol).items for item in sample), ())


@pytest.mark.parametrize("protocol", ["original", "lm_eval"])
def test_an_ending_without_tokens_is_rejected(protocol):
    def encode(texts, **_):
        return {"input_ids": [[1] * ("dog" in text) for text in texts]}

    with pytest.raises(UserError, match="item 3 encodes to no tokens"):
        encode_hellaswag([make_item()], encode, protocol)


@pytest.mark.parametrize("protocol", ["original", "lm_eval"])
def test_special_tokens_in_text_are_encoded_as_text(tokenizer, protocol):
    item = make_item("a <|endoftext|> b", "c", ("<|endoftext|>", "x", "y", "z"))
    encoded = encode_hellaswag([item], tokenizer, protocol).items[0]
    assert tokenizer.eos_token_id not in encoded.context_ids + encoded.ending_ids[0]


def test_each_protocol_is_encoded_once_and_lazily(sample, tokenizer, monkeypatch):
    encoded, encode = [], hellaswag_protocols.encode_hellaswag

    def count(items, tokenizer, protocol):
        encoded.append(protocol)
        return encode(items, tokenizer, protocol)

    monkeypatch.setattr(hellaswag_protocols, "encode_hellaswag", count)
    alone = SimpleNamespace(is_main_process=True, num_processes=1)
    questions = HellaSwagQuestions(sample, tokenizer, alone)
    assert encoded == []
    questions.check_fits(1024)
    first = questions.encode("original")
    assert encoded == ["original"] and questions.encode("original") is first
    assert questions.encode("lm_eval") == encode(sample, tokenizer, "lm_eval")
    assert questions.encode("lm_eval") is questions.encode("lm_eval") and encoded == ["original", "lm_eval"]


def test_other_processes_use_the_first_process_encoding(sample, tokenizer, monkeypatch):
    sent = []
    monkeypatch.setattr(devices, "broadcast_object_list", sent.append)
    first = SimpleNamespace(is_main_process=True, num_processes=2)
    questions = HellaSwagQuestions(sample, tokenizer, first)
    encoded = questions.encode("original")
    (answer,) = sent
    monkeypatch.setattr(devices, "broadcast_object_list", lambda received: received.__setitem__(slice(None), answer))
    monkeypatch.setattr(hellaswag_protocols, "encode_hellaswag", lambda *arguments: pytest.fail("encoded again"))
    other = SimpleNamespace(is_main_process=False, num_processes=2)
    assert HellaSwagQuestions(sample, tokenizer, other).encode("original") == encoded


@pytest.mark.parametrize("protocol", ["original", "lm_eval"])
def test_an_ending_too_long_for_the_model_is_rejected_in_both_protocols(protocol, tokenizer, monkeypatch):
    fits, too_long = "barks " * 5 + "loudly.", "barks " * 20 + "loudly."
    items = [make_item(endings=(fits, "sings.", "melts.", "folds."))]
    questions = HellaSwagQuestions(items, tokenizer, SimpleNamespace(is_main_process=True, num_processes=1))
    questions.check_fits(16)
    render = getattr(hellaswag_protocols, f"render_{protocol}")

    def render_longer(item):
        context, continuations = render(item)
        return context, [f" {too_long}", *continuations[1:]]

    monkeypatch.setattr(hellaswag_protocols, f"render_{protocol}", render_longer)
    questions = HellaSwagQuestions(items, tokenizer, SimpleNamespace(is_main_process=True, num_processes=1))
    with pytest.raises(UserError, match="does not fit the model's 16 positions"):
        questions.check_fits(16)
