"""Any file passed to `--config`."""

import pytest
import yaml
from cases import TINY, answer, cases, open_case, to_flags
from hypothesis import given
from hypothesis import strategies as st
from strategies import ODD_NUMBERS, damage_bytes, odd_json, texts

import eval_hellaswag
import prepare_data
import train

EVALUATE = {"model": "../given/model", "data_file": "../given/items.jsonl", "limit": 1}
PREPARE = {"files": "../given/corpus", "tokenizer": "../given/tokenizer", "output_dir": "../given/data"}
# The flags on the command line keep each script's work short.
SCRIPTS = {
    "train": (train.main, TINY, {"plan": True}),
    "prepare": (prepare_data.main, PREPARE, {"verify": True}),
    "evaluate": (eval_hellaswag.main, EVALUATE, {"limit": 1}),
}
ODD_FILES = [
    *(
        b"",
        b"# nothing\n",
        b"- a\n- b\n",
        b"text",
        b"5",
        b"null",
        b"a: [",
        b"a: b: c",
        b"\t",
        b"? [a]\n: b\n",
        b"{",
        b"---\n---\n",
        b"n_layer: !!python/name:os.system\n",
    ),
    *(b"\xff\xfe", b"\xef\xbb\xbfmax_steps: 1\n", b"\0" * 20, b"max_steps: \x07\n"),
    b"n_layer: !!python/object/apply:os.mkdir [../outside/ran]\n",
    b"!!python/object/new:os.mkdir [../outside/ran]\n",
    b"run_name: !!binary aGVsbG8=\n",
    b"skip_steps: ['--output_dir=../outside/x', '--help']\n",
    b'data_dir: "\\0"\n',
    b"run_name: '--'\n",
    b'sample_prompt: "\\ud800"\n',
    b"skip_steps: &a [*a]\n",
    b"n_layer: &a {b: *a}\n",
    b"<<: {n_layer: 1}\n",
    b"n_layer: 1\nn_layer: 2\n",
    b"n_layer: *nobody\n",
    # Each line expands to three times the one before it.
    b"x0: &x0 [y,y]\n" + b"".join(b"x%d: &x%d [*x%d,*x%d,*x%d]\n" % (i, i, i - 1, i - 1, i - 1) for i in range(1, 40)),
    b"skip_steps: " + b"[" * 30 + b"x" + b"]" * 30,
    b"skip_steps: " + b"[" * 5000,
    b"n_layer: " + b"9" * 5000,
    b"run_name: " + b"x" * 200_000,
]


@st.composite
def draw_settings_file(draw, base: dict) -> bytes:
    names = (
        st.sampled_from([*base, *base, "n_layers", "block_size", "seed", "report_to", "dtype", "max_tokens"]) | texts
    )
    values = odd_json | st.integers(0, 64) | texts | st.sampled_from(ODD_NUMBERS) | st.lists(texts, max_size=2)
    settings = base | {draw(names): draw(values) for _ in range(draw(st.integers(0, 2)))}
    return yaml.safe_dump(settings, allow_unicode=draw(st.booleans())).encode("utf-8", "surrogatepass")


@cases(120)
@given(st.data(), st.sampled_from(sorted(SCRIPTS)))
def test_files_of_settings(data, script):
    with open_case("data", "corpus", "tokenizer", "items.jsonl", "model") as case:
        main, base, limits = SCRIPTS[script]
        content = data.draw(draw_settings_file(base) | damage_bytes(yaml.safe_dump(base).encode()))
        (case.given / "settings.yaml").write_bytes(content)
        answer(main, ["--config=../given/settings.yaml", *to_flags(limits)], case)


@pytest.mark.parametrize("content", ODD_FILES, ids=lambda content: repr(content[:40]))
def test_odd_files(content):
    with open_case("data") as case:
        (case.given / "settings.yaml").write_bytes(content)
        answer(train.main, ["--config=../given/settings.yaml", *to_flags(TINY | {"plan": True})], case)
        answer(train.main, ["--config=../given/settings.yaml", "--plan"], case)


@pytest.mark.parametrize("name", ["", ".", "nowhere", "/dev/null", "../given/data", "x" * 300, "\udcff", "-", "~"])
def test_names_that_are_not_files(name):
    with open_case("data") as case:
        code = answer(train.main, [f"--config={name}", "--plan", "--max_steps=1"], case).code
        assert code == (0 if name == "/dev/null" else 2)
        answer(train.main, ["--config", name], case)
