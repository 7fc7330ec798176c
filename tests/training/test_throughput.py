"""Throughput, and the peaks of devices."""

import time

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from modeling_gpt2_repro.training import throughput
from modeling_gpt2_repro.training.throughput import PEAK_FLOPS, Clock, Peak, choose_peak, find_peak, measure_peak_flops

KNOWN = [
    ("NVIDIA GB300", 2500),
    ("NVIDIA B300 SXM6 AC", 2250),
    ("NVIDIA GB200", 2500),
    ("NVIDIA B200", 2250),
    ("NVIDIA GH200 480GB", 989),
    ("NVIDIA GH200 144G HBM3e", 989),
    ("NVIDIA H200", 989),
    ("NVIDIA H200 NVL", 835.5),
    ("NVIDIA H100 80GB HBM3", 989),
    ("NVIDIA H100", 989),
    ("NVIDIA H100 PCIe", 756),
    ("NVIDIA H100 NVL", 835.5),
    ("NVIDIA H800", 989),
    ("NVIDIA H800 PCIe", 756),
    ("NVIDIA H20", 148),
    ("NVIDIA H20-3e", 148),
    ("NVIDIA A100-SXM4-40GB", 312),
    ("NVIDIA A100-SXM4-80GB", 312),
    ("NVIDIA A100-PCIE-40GB", 312),
    ("NVIDIA A100 80GB PCIe", 312),
    ("NVIDIA A800-SXM4-80GB", 312),
    ("NVIDIA A800 40GB Active", 312),
    ("NVIDIA A40", 149.7),
    ("NVIDIA A30", 165),
    ("NVIDIA A10G", 70),
    ("NVIDIA A10", 125),
    ("NVIDIA L40S", 362.05),
    ("NVIDIA L40", 181.05),
    ("NVIDIA L4", 121),
    ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 503.8),
    ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", 438.9),
    ("NVIDIA RTX 6000 Ada Generation", 364.25),
    ("NVIDIA RTX A6000", 154.8),
    ("NVIDIA GeForce RTX 5090", 209.5),
    ("NVIDIA GeForce RTX 4090", 165.2),
    ("NVIDIA GeForce RTX 3090 Ti", 80),
    ("NVIDIA GeForce RTX 3090", 71),
    ("Tesla V100-SXM2-32GB", 125),
    ("Tesla V100-PCIE-16GB", 112),
    ("Tesla T4", 65),
    ("AMD Instinct MI300X", 1307.4),
    ("AMD Instinct MI300X VF", 1307.4),
]


@pytest.mark.parametrize("name, teraflops", KNOWN)
def test_peaks_of_known_devices(name, teraflops):
    half = find_peak(name, "bf16")
    assert half.flops == pytest.approx(teraflops * 1e12)
    assert find_peak(name, "fp16") == half
    single = find_peak(name, "no")
    if name.startswith(("Tesla", "AMD")):
        assert single is None  # no TF32
    else:
        assert single == Peak(half.flops / 2, half.source)


def test_every_entry_is_reachable_and_has_a_source():
    assert {find_peak(name, "bf16") for name, _ in KNOWN} == {
        Peak(rate * 1e12, source) for rate, source in PEAK_FLOPS.values()
    }
    assert all(source.startswith(("NVIDIA ", "AMD ")) for _, source in PEAK_FLOPS.values())


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA T400 4GB",
        "NVIDIA T4G",
        "NVIDIA RTX A4000",
        "NVIDIA RTX A400",
        "NVIDIA RTX 4000 Ada Generation",
        "NVIDIA A100X",
        "NVIDIA A100-SXM-64GB",
        "NVIDIA A10M",
        "NVIDIA A30X",
        "NVIDIA L20",
        "NVIDIA GB10",
        "NVIDIA B100",
        "NVIDIA H100 80GB HBM2e",
        "NVIDIA H800 NVL",
        "Tesla V100S-PCIE-32GB",
        "Tesla V100-FHHL-16GB",
        "NVIDIA GeForce RTX 3080 Ti",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 5090 D",
        "NVIDIA GeForce RTX 5090 D v2",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 5090 Laptop GPU",
        "Quadro RTX 6000",
        "NVIDIA RTX PRO 6000 Blackwell Server Edition",
        "NVIDIA RTX PRO 5000 Blackwell",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA H100 80GB HBM3 MIG 3g.40gb",
        "NVIDIA A10-4Q",
        "GRID A100-40C",
        "GRID T4-16Q",
        "AMD Instinct MI300X HF",
        "AMD Instinct MI300A",
        "AMD Instinct MI325X",
        "NVIDIA Graphics Device",
    ],
)
def test_an_unknown_device_is_not_mistaken_for_a_known_one(name):
    assert find_peak(name, "bf16") is None
    assert find_peak(name, "no") is None


@pytest.mark.parametrize(
    "name, precision, tf32, expected",
    [
        ("NVIDIA H100 PCIe", "bf16", True, Peak(756e12, "NVIDIA H100 data sheet")),
        ("NVIDIA H100 PCIe", "no", True, Peak(378e12, "NVIDIA H100 data sheet")),
        ("NVIDIA H100 PCIe", "no", False, Peak(1e12, "measured by a matrix product")),
        ("AMD Instinct MI300X", "no", True, Peak(1e12, "measured by a matrix product")),
        ("NVIDIA GeForce RTX 4090 D", "bf16", True, Peak(1e12, "measured by a matrix product")),
    ],
)
def test_an_unknown_gpu_is_measured(name, precision, tf32, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(throughput, "measure_peak_flops", lambda device, precision: 1e12)
    assert choose_peak(torch.device("cuda"), precision, tf32) == expected


def test_a_cpu_is_measured():
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
def test_the_peak_is_measured_on_random_finite_numbers(precision, monkeypatch):
    monkeypatch.setattr(throughput, "CPU_PROBE_SIZE", 64)
    with Products() as products:
        measure_peak_flops(torch.device("cpu"), precision)
    assert products.operand.unique().numel() > 100
    assert (products.operand @ products.operand).isfinite().all()


def test_the_clock_records_activities_that_succeed():
    clock = Clock()
    for _ in range(2):
        with clock.measure("evaluation"):
            time.sleep(0.01)
    with pytest.raises(ValueError), clock.measure("checkpoint"):
        raise ValueError
    assert len(clock.seconds["evaluation"]) == 2
    assert min(clock.seconds["evaluation"]) >= 0.01
    assert clock.seconds["checkpoint"] == []
