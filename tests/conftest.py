"""What every test relies on: no network, the CPU, one thread a process, and small real data."""

import functools
import os

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
os.environ.pop("WANDB_API_KEY", None)

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from fork_server import serve_forks

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED_DATA = REPOSITORY.parent / "shared" / "data"

torch.set_num_threads(1)
# The scripts lie beside the package and are no part of it.
sys.path.insert(0, str(REPOSITORY))

STORY = (
    "The old lighthouse keeper counted the ships each evening and wrote their names into a book. "
    "When the fog came he rang the bell, and when the fog left he slept. "
    "One winter a ship did not answer the bell, and the keeper rowed out to look for her. "
)


@pytest.fixture(scope="session")
def tokenizer():
    from modeling_gpt2_repro.data.tokenizer import load_tokenizer

    return load_tokenizer()


@pytest.fixture(scope="session")
def shards(tmp_path_factory, tokenizer) -> Path:
    """A folder of shards without a manifest: documents of shuffled sentences, in three files."""
    folder = tmp_path_factory.mktemp("shards")
    sentences = [sentence + "." for sentence in STORY.split(". ")]
    generator = np.random.default_rng(0)
    documents = [" ".join(generator.permutation(sentences)) for _ in range(160)]
    ids = [[tokenizer.eos_token_id, *tokenizer(document)["input_ids"]] for document in documents]
    train, val = np.concatenate(ids[16:]).astype(np.uint16), np.concatenate(ids[:16]).astype(np.uint16)
    np.save(folder / "story_val_000000.npy", val)
    np.save(folder / "story_train_000001.npy", train[:5000])
    np.save(folder / "story_train_000002.npy", train[5000:])
    return folder


@pytest.fixture(scope="session")
def forks():
    """Processes of their own of `train`, whose imports are waited for once."""
    with serve_forks(["train"], {**os.environ, "PYTHONPATH": str(REPOSITORY)}) as server:
        yield server


@pytest.fixture(scope="session", autouse=True)
def _one_probe():
    """A run measures its CPU, which takes a second: here the first run does it for all others of the process."""
    from modeling_gpt2_repro.training import throughput

    throughput.measure_peak_flops = functools.cache(throughput.measure_peak_flops)


@pytest.fixture(autouse=True)
def _no_pictures_meanwhile(monkeypatch):
    """A run draws its last picture and, in this process, none before: another process would take seconds for it."""
    from modeling_gpt2_repro.plots.drawer import CurveDrawer

    monkeypatch.setattr(CurveDrawer, "request", lambda self: None)


@pytest.fixture(autouse=True)
def _fresh_accelerate_state():
    """accelerate and torch keep their state in the process, and a second run in it may want another precision."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(1)  # the bits of a loss depend on it
