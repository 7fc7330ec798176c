"""Fixtures of the GPU tests. Without a GPU they are skipped; `GPU_TESTS_DEVICE=cpu` runs them at toy size."""

import gc
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch


@dataclass(frozen=True)
class Scale:
    """The device of the session, and sizes at which the tests take minutes.

    Attributes:
        shape: the shape of the trained model; `n_layer` is small because each layer adds to the compile time.
        learning_rate: so large that a few updates change the loss.
        precision: the `--mixed_precision` of runs.
        n_items: the number of HellaSwag items.
        n_updates: the updates of a run, enough for a signal to arrive before the last one.
    """

    device: torch.device
    shape: dict[str, int]
    sequence_length: int
    micro_batch_size: int
    learning_rate: float
    precision: str
    n_items: int
    n_updates: int

    @property
    def is_cuda(self) -> bool:
        """Whether checks that need CUDA can run."""
        return self.device.type == "cuda"

    @property
    def settings(self) -> dict[str, Any]:
        """Flags of a run with four compiled micro-steps per update; shared, so that they are compiled only once."""
        tokens_per_step = 4 * self.micro_batch_size * self.sequence_length
        return {
            **self.shape,
            "sequence_length": self.sequence_length,
            "micro_batch_size": self.micro_batch_size,
            "tokens_per_step": tokens_per_step,
            "warmup_tokens": 2 * tokens_per_step,
            "learning_rate": self.learning_rate,
            "mixed_precision": self.precision,
            "compile": "on",
            "eval_tokens": 4 * self.sequence_length,
            "shuffle_windows": "off",
        }


SCALES = {
    "cuda": Scale(
        device=torch.device("cuda"),
        shape={"n_layer": 2, "n_head": 12, "n_embd": 768},
        sequence_length=512,
        micro_batch_size=4,
        learning_rate=1e-3,
        precision="bf16",
        n_items=500,
        n_updates=400,
    ),
    "cpu": Scale(
        device=torch.device("cpu"),
        shape={"n_layer": 1, "n_head": 2, "n_embd": 32},
        sequence_length=64,
        micro_batch_size=2,
        learning_rate=1e-2,
        precision="no",
        n_items=24,
        n_updates=80,
    ),
}


@pytest.fixture(scope="session", autouse=True)
def scale() -> Scale:
    name = os.environ.get("GPU_TESTS_DEVICE", "cuda")
    if name not in SCALES:
        raise ValueError(f"GPU_TESTS_DEVICE must be one of {', '.join(SCALES)}, not {name}")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device (GPU_TESTS_DEVICE=cpu runs this at toy size)")
    return SCALES[name]


@pytest.fixture(scope="module", autouse=True)
def _device(scale) -> Iterator[None]:
    """Allow the GPU, which other tests disable; clean up compiled code, settings and memory after each module."""
    precision, is_deterministic = torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()
    with pytest.MonkeyPatch.context() as patch:
        if scale.is_cuda:
            patch.delenv("ACCELERATE_USE_CPU", raising=False)
        torch._dynamo.reset()
        yield
    torch._dynamo.reset()
    torch.set_float32_matmul_precision(precision)
    torch.use_deterministic_algorithms(is_deterministic)
    gc.collect()
    if scale.is_cuda:
        torch.cuda.empty_cache()


@pytest.fixture
def exact_float32() -> Iterator[None]:
    """Multiply float32 matrices without TF32."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(precision)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A folder of shards of random ids; small ids are more frequent, which a model can learn."""
    folder = tmp_path_factory.mktemp("corpus")
    generator = np.random.default_rng(0)
    for name, n_tokens in (("x_val_000000", 10_000), ("x_train_000001", 200_000), ("x_train_000002", 150_000)):
        np.save(folder / f"{name}.npy", (50_256 * generator.random(n_tokens) ** 4).astype(np.uint16))
    return folder
