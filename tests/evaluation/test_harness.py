"""The `lm_eval` protocol against lm-evaluation-harness itself, with the same model and items."""

import json
import random
from pathlib import Path

import pytest
import torch
from conftest import SHARED_DATA
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from modeling_gpt2_repro.data.tokenizer import load_data_tokenizer
from modeling_gpt2_repro.evaluation.hellaswag import evaluate_hellaswag
from modeling_gpt2_repro.evaluation.hellaswag_data import SAMPLE_FILE, load_hellaswag
from modeling_gpt2_repro.evaluation.hellaswag_protocols import encode_hellaswag

pytest.importorskip("lm_eval", reason="lm-evaluation-harness (lm_eval) is not installed: run `make install`")
from harness import encode_pairs, run_harness

# The harness warns when it divides by the length of an ending that is empty after its marks are removed.
pytestmark = [pytest.mark.heavy, pytest.mark.filterwarnings("ignore:divide by zero")]
REAL_FILE = SHARED_DATA / "hellaswag_val.jsonl"

# Marks, double spaces, contexts that end in a bracket, spaces at either end, and text that resembles these.
CONTEXTS = [
    ("[header] How to bake bread [title] Mix the flour. [step] Add water slowly.", ""),
    ("Baking  bread  takes  time. [step]", ""),
    ("Then she reads [substeps] [title]", ""),
    ("He wipes the table [with a cloth]", ""),
    ("A man is on a roof. ", "he "),
    ("  Two dogs run.   They stop. ", " the DOGS"),
    ("An open [bracket is never closed.", "it"),
    ("A closed] bracket was never opened.", "it"),
    ("[step]", "she"),
    ("Ünïcödé · naïve café [title] 東京 — “quoted”. \t", "élan"),
]
ENDINGS = [
    ["[title] Wait an hour. [step] Fold it.", "stops.", " leans  over  twice. ", "goes [substeps]"],
    ["walks away.", "[x]", "sings [loudly] and   leaves.", "a"],
    ["'s hat falls.", ", then jumps.", "\tturns\nround.", "…"],
]


def write_items(path: Path) -> list[dict]:
    rows = [
        {
            "ind": number,
            "activity_label": ("Baking", "Home [and] garden ", "A  label")[number % 3],
            "ctx_a": ctx_a,
            "ctx_b": ctx_b,
            "ctx": f"{ctx_a} {ctx_b}",
            "endings": endings,
            "label": str(number % 4),
            "split": "val",
        }
        for number, (ctx_a, ctx_b, endings) in enumerate(
            (*context, endings) for context in CONTEXTS for endings in ENDINGS
        )
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


@pytest.fixture
def sample_file(tmp_path):
    """Every fourth item of the packaged sample."""
    (tmp_path / "sample.jsonl").write_text("\n".join(SAMPLE_FILE.read_text().splitlines()[::4]))
    return tmp_path / "sample.jsonl"


def build_gpt2(n_positions=512, **changes):
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": n_positions, **changes}
    return GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.3)).eval()


def assert_matches_harness(model, tokenizer, path, n_truncated=0):
    expected = run_harness(model, tokenizer, path)
    encoded = encode_hellaswag(load_hellaswag(path), tokenizer, "lm_eval")
    result = evaluate_hellaswag(model, encoded, show_progress=False)
    assert result.n == len(expected["nll"])
    for item, nll in zip(result.scored_items, expected["nll"], strict=True):
        assert item.nll == pytest.approx(nll, abs=1e-3)
    for name in ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr"):
        assert getattr(result, name) == expected[name], name
    assert 0 < result.acc < 1
    assert result.n_truncated == n_truncated


def test_items_with_every_mark_match_the_harness(tokenizer, tmp_path):
    assert len(write_items(tmp_path / "items.jsonl")) == 30
    assert_matches_harness(build_gpt2(), tokenizer, tmp_path / "items.jsonl")


@pytest.fixture
def real_file(tmp_path):
    if not REAL_FILE.exists():
        pytest.skip("HellaSwag's validation items are not on this machine")
    lines = REAL_FILE.read_text().splitlines()
    (tmp_path / "items.jsonl").write_text("\n".join(random.Random(0).sample(lines, 200)))
    return tmp_path / "items.jsonl"


def test_200_real_items_match_the_harness(shards, real_file):
    """Use a tokenizer of few ids, because the harness computes the logits of all ids at every position."""
    tokenizer = load_data_tokenizer(shards)
    assert_matches_harness(build_gpt2(n_positions=1024, vocab_size=len(tokenizer)), tokenizer, real_file)


def test_200_real_items_are_encoded_by_gpt2s_tokenizer_as_in_the_harness(tokenizer, real_file):
    items = encode_hellaswag(load_hellaswag(real_file), tokenizer, "lm_eval").items
    pairs = [(list(item.context_ids), list(ids)) for item in items for ids in item.ending_ids]
    assert pairs == encode_pairs(build_gpt2(), tokenizer, real_file) and len(pairs) == 800


def test_long_contexts_are_truncated_as_in_the_harness(tokenizer, sample_file):
    n_long = sum(
        max(len(item.context_ids) + len(ids) for ids in item.ending_ids) > 49
        for item in encode_hellaswag(load_hellaswag(sample_file), tokenizer, "lm_eval").items
    )
    assert 0 < n_long < 12
    assert_matches_harness(build_gpt2(n_positions=48), tokenizer, sample_file, n_truncated=n_long)


def test_another_architecture_matches_the_harness(tokenizer, sample_file):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.3, max_position_embeddings=512, **sizes)
    assert_matches_harness(LlamaForCausalLM(config).eval(), tokenizer, sample_file)
