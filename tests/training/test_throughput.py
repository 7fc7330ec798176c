"""Speed, and what it is measured against."""

import time

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from modeling_gpt2_repro.training import throughput
from modeling_gpt2_repro.training.throughput import Clock, choose_peak, find_peak_flops, measure_peak_flops


@pytest.mark.parametrize(
    "name, precision, teraflops",
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA GH200 480GB", "bf16", 989),
        ("NVIDIA GB200", "bf16", 2500),
        ("NVIDIA B200", "bf16", 2250),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA A100-SXM4-80GB", "no", 156),
        ("NVIDIA A10G", "bf16", 70),
        ("NVIDIA A10", "bf16", 125),
        ("NVIDIA L4", "bf16", 121),
        ("NVIDIA L40S", "bf16", 362),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        ("Tesla T4", "fp16", 65),
    ],
)
def test_peak_of_known_devices(name, precision, teraflops):
    assert find_peak_flops(name, precision) == pytest.approx(teraflops * 1e12)


@pytest.mark.parametrize(
    "name, precision",
    [
        ("NVIDIA T400", "bf16"),
        ("NVIDIA RTX A4000", "bf16"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16"),
        ("Tesla T4", "no"),
        ("AMD Instinct MI300X", "bf16"),
    ],
)
def test_a_device_that_is_not_in_the_table_is_not_taken_for_one_that_is(name, precision):
    assert find_peak_flops(name, precision) is None


def test_a_cpu_is_measured_and_said_to_be():
    peak = choose_peak(torch.device("cpu"), "no")
    assert peak.source == "measured by a matrix product"
    assert 1e9 < peak.flops < 1e14
    assert measure_peak_flops(torch.device("cpu"), "no") == pytest.approx(peak.flops, rel=0.9)


class Products(TorchDispatchMode):
    """Keeps the left operand of the last matrix product."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.mm.default:
            self.operand = args[0]
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_a_peak_is_measured_on_numbers_like_those_of_training(precision, monkeypatch):
    monkeypatch.setattr(throughput, "CPU_PROBE_SIZE", 64)
    with Products() as products:
        measure_peak_flops(torch.device("cpu"), precision)
    assert products.operand.unique().numel() > 100
    assert (products.operand @ products.operand).isfinite().all()


def test_clock_adds_up_activities_and_forgets_failed_ones():
    clock = Clock()
    for _ in range(2):
        with clock.measure("evaluation"):
            time.sleep(0.01)
    with pytest.raises(ValueError), clock.measure("checkpoint"):
        raise ValueError
    assert len(clock.seconds["evaluation"]) == 2
    assert min(clock.seconds["evaluation"]) >= 0.01
    assert clock.seconds["checkpoint"] == []
