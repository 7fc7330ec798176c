"""Errors in the middle of a run, and their advice."""

from pathlib import Path

import numpy as np
import pytest
import torch

from modeling_gpt2_repro.core.errors import UserError
from modeling_gpt2_repro.training.faults import (
    NonFiniteError,
    explained_nondeterminism,
    explained_out_of_memory,
    is_write_failure,
)


def test_a_non_finite_update_reports_its_windows_and_how_to_skip_it():
    error = NonFiniteError(7, float("nan"), float("inf"), np.arange(48, 56))
    assert "update 7 has a loss of nan" in str(error)
    assert "windows 48 to 55" in str(error)
    assert "--skip_steps 7:7" in str(error)
    assert error.details == {"update": 7, "windows": list(range(48, 56))}
    assert "8 windows of" in str(NonFiniteError(7, 1.0, float("inf"), np.array([9, 4, 1, 30, 2, 5, 7, 8])))


@pytest.mark.parametrize("size, advice", [(8, "--micro_batch_size 4 or"), (1, "resume with --gradient_checkpointing")])
@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA"), RuntimeError("[enforce] DefaultCPUAllocator: can't allocate memory: x")]
)
def test_running_out_of_memory_suggests_settings_that_need_less(size, advice, error):
    with pytest.raises(UserError, match=advice) as raised, explained_out_of_memory([8, 4, 2, 1], size):
        raise error
    assert "--gradient_checkpointing" in str(raised.value)


def test_other_errors_are_not_changed():
    with pytest.raises(RuntimeError, match="shape") as raised, explained_out_of_memory([1], 1):
        raise RuntimeError("shape mismatch")
    assert not isinstance(raised.value, UserError)


def test_an_operation_without_a_deterministic_implementation_is_named():
    torch.use_deterministic_algorithms(True)
    try:
        with (
            pytest.raises(UserError, match="put_ has no deterministic") as raised,
            explained_nondeterminism(),
        ):
            torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert "drop --deterministic" in str(raised.value)
    with pytest.raises(RuntimeError, match="shape"), explained_nondeterminism():
        raise RuntimeError("shape mismatch")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no device that is always full")
@pytest.mark.parametrize(
    "write",
    [
        lambda path, tokenizer: torch.save({"moments": torch.zeros(2**20)}, path),
        lambda path, tokenizer: torch.save({"moments": torch.zeros(2)}, path),
        lambda path, tokenizer: tokenizer.backend_tokenizer.save(str(path)),
        lambda path, tokenizer: path.write_text("text"),
    ],
    ids=["torch", "torch at its end", "tokenizers", "Python"],
)
def test_a_full_disk_is_recognized_in_every_librarys_error(tokenizer, write):
    with pytest.raises(Exception) as raised:
        write(Path("/dev/full"), tokenizer)
    assert is_write_failure(raised.value)


@pytest.mark.parametrize("error", [RuntimeError("shape mismatch"), Exception("no such model"), ValueError("os error")])
def test_other_errors_are_not_taken_for_a_full_disk(error):
    assert not is_write_failure(error)
