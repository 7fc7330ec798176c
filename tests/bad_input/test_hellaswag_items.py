"""Any file of HellaSwag items."""

import json

import pytest
from cases import answer, build_originals, cases, open_case
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import NO_FILES, ODD_JSON_FILES, damage_bytes, damage_json, replace_file

import eval_hellaswag

COMMAND = [
    "--model=../given/model",
    "--data_file=../given/items.jsonl",
    "--output=out.json",
    "--per_example=out.jsonl",
]


def read_items() -> list:
    return [json.loads(line) for line in (build_originals() / "items.jsonl").read_text().splitlines()]


def evaluate(content: bytes) -> int:
    with open_case("model", "items.jsonl") as case:
        (case.given / "items.jsonl").write_bytes(content)
        code = answer(eval_hellaswag.main, COMMAND, case).code
        results = case.folder / "cwd" / "out.json"
        assert results.exists() == (code == 0)
        if code == 0:
            json.loads(results.read_text())
        return code


def write(items: list) -> bytes:
    return "".join(json.dumps(item) + "\n" for item in items).encode()


ODD_ENDINGS = ["[x]", " ", "a" * 500, "\x1c", "\u00a0x", "\ud83d", "[[", "  ", "\n", "<|endoftext|>", "é" * 70, "\x00"]


@cases(110)
@given(st.data())
def test_items(data):
    items = read_items()
    damaged = data.draw(damage_json(items[data.draw(st.integers(0, 2))], most=3))
    if isinstance(damaged, dict) and isinstance(damaged.get("endings"), list) and data.draw(st.booleans()):
        damaged["endings"] = [data.draw(st.sampled_from(ODD_ENDINGS) | st.text(max_size=6)) for _ in range(4)]
    evaluate(write([*items[:1], damaged]))


@cases(60)
@given(st.data())
def test_bytes(data):
    whole = write(read_items())
    evaluate(data.draw(damage_bytes(whole) | st.sampled_from(ODD_JSON_FILES).map(lambda line: whole + line)))


@pytest.mark.parametrize("field", ["activity_label", "ctx_a", "ctx_b", "ctx", "endings"])
def test_a_lone_surrogate_is_rejected(field):
    item = read_items()[0]
    value = [*item["endings"][:3], "x \ud83d"] if field == "endings" else "x \ud83d"
    assert evaluate(write([item | {field: value}])) == 2


@pytest.mark.parametrize("content", ODD_JSON_FILES, ids=range(len(ODD_JSON_FILES)))
def test_odd_files(content):
    assert evaluate(content) == 2


@pytest.mark.parametrize("kind", NO_FILES)
def test_paths_that_are_not_files(kind):
    with open_case("model", "items.jsonl") as case:
        replace_file(case.given / "items.jsonl", kind, case.outside)
        assert answer(eval_hellaswag.main, COMMAND, case).code == 2


@example("label", 1.7)
@example("label", True)
@example("ind", 10**400)
@cases(8)
@given(
    st.sampled_from(["ind", "label"]), st.sampled_from([0.5, float("nan"), float("inf"), "1.0", None, [], {}, False])
)
def test_numbers_that_are_not_integers(field, value):
    items = read_items()
    assert evaluate(write([items[0] | {field: value}])) == (0 if value == 10**400 else 2)
