"""What every test relies on: no network, the CPU, one thread a process, and small real data."""

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

torch.set_num_threads(1)
_request = CurveDrawer.request


def pytest_collection_finish():
    """Spare the garbage collector the million objects of the imports: each run collects, and would take 0.3 s."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer()


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    """A folder of shards of a small vocabulary."""
    return write_story_data(tmp_path_factory.mktemp("story"))


@pytest.fixture(scope="session")
def gpt2_shards(tmp_path_factory, tokenizer) -> Path:
    """A folder of shards of GPT-2's ids without a manifest: documents of shuffled sentences, in three files."""
    folder = tmp_path_factory.mktemp("shards")
    ids = [[tokenizer.eos_token_id, *tokenizer(text)["input_ids"]] for text in draw_documents(160)]
    train, val = np.concatenate(ids[16:]).astype(np.uint16), np.concatenate(ids[:16]).astype(np.uint16)
    np.save(folder / "story_val_000000.npy", val)
    np.save(folder / "story_train_000001.npy", train[:5000])
    np.save(folder / "story_train_000002.npy", train[5000:])
    return folder


@pytest.fixture(scope="session")
def forks():
    """Processes of their own of the scripts and commands, whose imports are waited for once."""
    modules = ["train", "prepare_data", "eval_hellaswag", "modeling_gpt2_repro.__main__", "standard_streams", "cases"]
    path = os.pathsep.join(str(REPOSITORY / name) for name in ("", "tests", "tests/bad_input"))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    with serve_forks(modules, environment, QUICKER) as server:
        yield server


@pytest.fixture(scope="session", autouse=True)
def _one_probe():
    """A run measures its CPU, which takes a second: here the first run does it for all others of the process."""
    throughput.measure_peak_flops = functools.cache(throughput.measure_peak_flops)


@pytest.fixture(scope="session", autouse=True)
def _no_pictures():
    """A run in this process leaves a stand-in for its last picture, and has none drawn before; see `real_pictures`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CurveDrawer, "request", lambda self: None)
        patch.setattr(drawer, "draw_curves", lambda folder: folder.curves.write_bytes(b"a picture"))
        yield


@contextlib.contextmanager
def real_pictures() -> Iterator[None]:
    """Let runs draw: half a second for each at its end, and three seconds for a process that draws meanwhile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CurveDrawer, "request", _request)
        patch.setattr(drawer, "draw_curves", draw_curves)
        yield


@pytest.fixture(autouse=True)
def _fresh_accelerate_state():
    """accelerate and torch keep their state in the process, and a second run in it may want another precision."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(1)  # the bits of a loss depend on it
