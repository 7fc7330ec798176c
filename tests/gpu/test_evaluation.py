"""HellaSwag with each of torch's attention backends for the device."""

import contextlib
import math
import warnings
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, SHARED_DATA
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpu.drawn_models import draw_model
from modeling_gpt2_repro.evaluation.hellaswag import evaluate_hellaswag
from modeling_gpt2_repro.evaluation.hellaswag_data import SAMPLE_FILE, load_hellaswag
from modeling_gpt2_repro.evaluation.hellaswag_protocols import encode_hellaswag
from modeling_gpt2_repro.evaluation.scoring import can_share_context, evaluation_mode, score_items
from modeling_gpt2_repro.evaluation.shared_context import build_rows
from modeling_gpt2_repro.model.limits import get_max_positions

# Tolerance of an ending's sum, of about 200 nats, against attention written out in the same precision.
LARGEST_ERRORS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
LEAST_AGREEMENT = 0.98
BACKENDS = {
    "flash": [SDPBackend.FLASH_ATTENTION],
    "efficient": [SDPBackend.EFFICIENT_ATTENTION],
    "cudnn": [SDPBackend.CUDNN_ATTENTION],
    "chosen": None,  # torch chooses, as in a run
}


# On a GPU, flash and cuDNN attention do not support float32.
PAIRS = [(name, torch.bfloat16) for name in BACKENDS] + [(name, torch.float32) for name in ("efficient", "chosen")]


def find_items() -> Path:
    """Return HellaSwag's validation set if it is available, else the packaged sample."""
    places = (SHARED_DATA / "hellaswag_val.jsonl", REPOSITORY / ".gpu" / "hellaswag_val.jsonl.gz")
    return next((path for path in places if path.exists()), SAMPLE_FILE)


@pytest.fixture(scope="module")
def encoded(scale, tokenizer):
    return encode_hellaswag(load_hellaswag(find_items(), scale.n_items), tokenizer, "original")


@pytest.fixture(scope="module")
def model(scale):
    return draw_model({**scale.shape, "n_layer": 4}, n_positions=1024).to(scale.device)


def choose_precision(precision: torch.dtype, device: torch.device) -> contextlib.AbstractContextManager:
    return torch.autocast(device.type, precision, enabled=precision != torch.float32)


def evaluate(model, encoded, precision):
    with choose_precision(precision, model.device):
        return evaluate_hellaswag(model, encoded, show_progress=False, batch_tokens=8192)


@pytest.fixture(scope="module")
def expected(model, encoded):
    """The results of attention written out, by precision."""
    torch.set_float32_matmul_precision("highest")
    with sdpa_kernel(SDPBackend.MATH):
        return {precision: evaluate(model, encoded, precision) for precision in LARGEST_ERRORS}


def restrict_attention(backends: list[SDPBackend] | None) -> contextlib.AbstractContextManager:
    return sdpa_kernel(backends) if backends else contextlib.nullcontext()


def can_attend(
    backends: list[SDPBackend] | None, precision: torch.dtype, device: torch.device, is_masked: bool
) -> bool:
    """Return whether a backend supports this precision, causal or with a mask."""
    states = torch.randn(2, 12, 137, 64, device=device, dtype=precision)
    mask = torch.zeros(2, 1, 137, 137, device=device, dtype=precision) if is_masked else None
    with restrict_attention(backends), warnings.catch_warnings(action="ignore"):  # it warns at length
        try:
            torch.nn.functional.scaled_dot_product_attention(states, states, states, mask, is_causal=not is_masked)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            return False
    return True


def test_the_model_prefers_one_ending_to_another(expected, encoded):
    """Otherwise the tests below would compare nothing."""
    for result in expected.values():
        assert {item.predicted_norm for item in result.scored_items} == {0, 1, 2, 3}
        best = [
            sorted(nll / length for nll, length in zip(scored.nll, item.ending_lengths, strict=True))
            for scored, item in zip(result.scored_items, encoded.items, strict=True)
        ]
        assert sum(second - first for first, second, *_ in best) / len(best) > 0.1  # nats per token


@pytest.mark.parametrize("name, precision", PAIRS)
def test_endings_have_the_sums_of_attention_written_out(
    scale, model, encoded, expected, exact_float32, name, precision
):
    backends = BACKENDS[name]
    if not can_attend(backends, precision, scale.device, is_masked=False):
        pytest.skip(f"{name} attention has no {precision} on this device")
    takes_mask = can_attend(backends, precision, scale.device, is_masked=True)
    with restrict_attention(backends), warnings.catch_warnings(action="ignore"):
        result = evaluate(model, encoded, precision)
        with evaluation_mode(model), choose_precision(precision, scale.device):
            # A backend that supports masks gives the same result with and without one.
            shares_context = can_share_context(model, encoded.items, get_max_positions(model))
            # Beside the longest item, the shortest consists mostly of padding.
            items = sorted(encoded.items, key=lambda item: item.n_read)
            pair = [items[0], items[-1]]
            rows = [build_rows(item, get_max_positions(model), shares_context) for item in pair]
            padded = score_items(model, rows, selects_places=shares_context)
    assert shares_context == takes_mask
    theirs, bound = expected[precision], LARGEST_ERRORS[precision]
    sums = {}
    for ours, other in zip(result.scored_items, theirs.scored_items, strict=True):
        assert ours.nll == pytest.approx(other.nll, rel=bound)
        sums[ours.ind] = ours.nll
    for item, nll in zip(pair, padded, strict=True):
        assert all(map(math.isfinite, nll)) and nll == pytest.approx(sums[item.ind], rel=bound)
    for choice in ("predicted", "predicted_norm"):
        pairs = zip(result.scored_items, theirs.scored_items, strict=True)
        same = sum(getattr(ours, choice) == getattr(other, choice) for ours, other in pairs)
        assert same >= LEAST_AGREEMENT * len(encoded.items), choice
