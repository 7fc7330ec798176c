"""Fitting a run to a GPU, of which these tests fake the memory."""

from types import SimpleNamespace

import pytest
import torch

from modeling_gpt2_repro import MODEL_SIZES, GPT2ReproConfig, GPT2ReproForCausalLM
from modeling_gpt2_repro.core.errors import UserError
from modeling_gpt2_repro.training import device_fit
from modeling_gpt2_repro.training.config import TrainingConfig
from modeling_gpt2_repro.training.memory import describe_step_memory


@pytest.mark.parametrize(
    "gigabytes, size, sizes, advice",
    [
        (85, "124M", [64, 32, 16, 8, 4, 2, 1], "checkpointing"),
        (25, "124M", [32, 16, 8, 4, 2, 1], "checkpointing"),
        (25, "1558M", [1], "--model_size 774M"),
    ],
)
def test_on_a_gpu_the_trial_starts_at_the_largest_size_estimated_to_fit(gigabytes, size, sizes, advice, monkeypatch):
    monkeypatch.setattr(device_fit, "measure_device_memory", lambda device: gigabytes * 1e9)
    accelerator = SimpleNamespace(device=torch.device("cuda", 0), mixed_precision="bf16", num_processes=1)
    config = TrainingConfig(model_size=size)
    with torch.device("meta"):
        model = GPT2ReproForCausalLM(GPT2ReproConfig(**MODEL_SIZES[size]))

    def list_tried(state: SimpleNamespace | None) -> list[int]:
        memory = describe_step_memory(config, model, "bf16")
        tried, advised = device_fit.choose_sizes([64, 32, 16, 8, 4, 2, 1], memory, state, accelerator)
        assert advice in advised
        return tried

    assert list_tried(None) == sizes
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    # On the same hardware, the size of the earlier run is used, even if it was set by hand.
    before = SimpleNamespace(micro_batch_size=16, hardware="1 x NVIDIA H100 80GB HBM3")
    assert list_tried(before) == [16, 8, 4, 2, 1]
    assert list_tried(SimpleNamespace(micro_batch_size=16, hardware="2 x NVIDIA H100 80GB HBM3")) == sizes
    assert list_tried(SimpleNamespace(micro_batch_size=None, hardware=None)) == sizes


def test_weights_that_do_not_fit_a_gpu_are_reported_with_what_would(monkeypatch):
    def run_out(device):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 308.00 MiB")

    accelerator = SimpleNamespace(device=torch.device("cuda", 0), mixed_precision="bf16", process_index=0)
    with torch.device("meta"):
        model = GPT2ReproForCausalLM(GPT2ReproConfig(**MODEL_SIZES["1558M"]))
    monkeypatch.setattr(model, "to", run_out)
    memory = describe_step_memory(TrainingConfig(model_size="1558M"), model, "bf16")
    for gigabytes, advice in ((5.5, "--model_size 124M (about 4.4 GB)"), (1.0, "a smaller --model_size, or another")):
        monkeypatch.setattr(device_fit, "measure_device_memory", lambda device, size=gigabytes: size * 1e9)
        with pytest.raises(UserError, match=r"1,557,611,200 parameters do not fit") as raised:
            device_fit.place_on_device(model, memory, accelerator)
        assert advice in str(raised.value)
