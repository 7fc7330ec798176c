"""The setup of every test (no network, CPU only, one thread per process) and fixtures of small real data."""

import collections
import contextlib
import functools
import gc
import os

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
os.environ.pop("WANDB_API_KEY", None)

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from fork_server import QUICKER, serve_forks
from small_corpora import draw_documents, write_story_data

from modeling_gpt2_repro.data.tokenizer import load_tokenizer
from modeling_gpt2_repro.plots import drawer
from modeling_gpt2_repro.plots.drawer import CurveDrawer
from modeling_gpt2_repro.plots.run_figure import draw_curves
from modeling_gpt2_repro.training import throughput

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED_DATA = REPOSITORY.parent / "shared" / "data"

# Tests with one of these fixtures, directly or through another, and tests in these folders train a model, start
# processes or try hundreds of inputs. So do those marked as heavy themselves.
HEAVY_FIXTURES = {"shards", "gpt2_shards", "forks", "server"}
HEAVY_FOLDERS = {"bad_input", "benchmarks", "crash_points"}

torch.set_num_threads(1)
_request = CurveDrawer.request


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(items):
    """Mark tests that need shards or processes as heavy, and order files by their number of heavy tests.

    pytest-xdist assigns whole files in this order; a long file at the end would leave the other workers idle.
    """
    for item in items:
        if HEAVY_FIXTURES & set(item.fixturenames) or item.path.parent.name in HEAVY_FOLDERS:
            item.add_marker("heavy")
    n_heavy = collections.Counter(item.path for item in items if item.get_closest_marker("heavy"))
    items.sort(key=lambda item: -n_heavy[item.path])


def pytest_collection_finish():
    """Exempt the imports' million objects from garbage collection; every run collects, which would take 0.3 s."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer()


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    """A folder of shards with a small vocabulary."""
    return write_story_data(tmp_path_factory.mktemp("story"))


@pytest.fixture(scope="session")
def gpt2_shards(tmp_path_factory, tokenizer) -> Path:
    """A folder of three shards of GPT-2's ids, without a manifest; the documents are shuffled sentences."""
    folder = tmp_path_factory.mktemp("shards")
    ids = [[tokenizer.eos_token_id, *tokenizer(text)["input_ids"]] for text in draw_documents(160)]
    train, val = np.concatenate(ids[16:]).astype(np.uint16), np.concatenate(ids[:16]).astype(np.uint16)
    np.save(folder / "story_val_000000.npy", val)
    np.save(folder / "story_train_000001.npy", train[:5000])
    np.save(folder / "story_train_000002.npy", train[5000:])
    return folder


@pytest.fixture(scope="session")
def forks():
    """A server that runs scripts and commands in forked processes, after importing their modules once."""
    modules = ["train", "prepare_data", "eval_hellaswag", "modeling_gpt2_repro.__main__", "standard_streams", "cases"]
    path = os.pathsep.join(str(REPOSITORY / name) for name in ("", "tests", "tests/bad_input"))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    with serve_forks(modules, environment, QUICKER) as server:
        yield server


@pytest.fixture(scope="session", autouse=True)
def _measure_peak_once():
    """Measure the CPU's peak, which takes a second, once per process instead of once per run."""
    throughput.measure_peak_flops = functools.cache(throughput.measure_peak_flops)


@pytest.fixture(scope="session", autouse=True)
def _skip_pictures():
    """Skip the plots of runs in this process, except for a placeholder at the end; see `real_pictures`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CurveDrawer, "request", lambda self: None)
        patch.setattr(drawer, "draw_curves", lambda folder: folder.curves.write_bytes(b"a picture"))
        yield


@contextlib.contextmanager
def real_pictures() -> Iterator[None]:
    """Let runs draw, which takes 0.5 s at the end of each, and 3 s in a process that also draws during the run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CurveDrawer, "request", _request)
        patch.setattr(drawer, "draw_curves", draw_curves)
        yield


@pytest.fixture(autouse=True)
def _fresh_accelerate_state():
    """Reset the process-wide state of accelerate and torch, as the next run may need another precision."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(1)  # a loss depends on it, in its last bits
