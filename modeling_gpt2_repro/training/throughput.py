"""Training speed: where time is spent, and the device's peak rate for MFU."""

import contextlib
import re
import time
from collections import defaultdict
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

# Device names with their peak in TFLOP/s and its source, in the order of lookup.
PEAK_FLOPS = yaml.safe_load(Path(__file__).with_name("peak_flops.yaml").read_text(encoding="utf-8"))
# Names that contain one from the table but mean another device or part of one: a MIG instance, a virtual GPU.
OTHERS = re.compile(r"Laptop|\bMIG\b|-\d+[ABCQ]|RTX [45]090 D\b|A100-SXM-64GB|H100 \d+GB HBM2|H800 NVL|MI300X HF")
# Since NVIDIA's Ampere generation TF32 runs at half the rate of bf16. The two older GPUs have no TF32, and PyTorch
# uses AMD's only if an environment variable enables it.
WITHOUT_TF32 = ("V100-SXM2", "V100-PCIE", "T4", "MI300X")

# The matrix product that is timed where no data sheet applies: its size on a CPU and elsewhere, and the repetitions.
CPU_PROBE_SIZE, PROBE_SIZE, N_PROBES = 2048, 8192, 5


class Clock:
    """Records how long a run's activities take.

    Attributes:
        seconds: durations of each activity, in order.
    """

    def __init__(self):
        self.seconds: dict[str, list[float]] = defaultdict(list)

    @contextlib.contextmanager
    def measure(self, activity: str) -> Generator[None]:
        """Time the body of the context; an exception leaves no entry."""
        started = time.perf_counter()
        yield
        self.seconds[activity].append(time.perf_counter() - started)


@dataclass(frozen=True)
class Peak:
    """The peak rate of a device: `flops` in FLOP/s, and the `source` of the number."""

    flops: float
    source: str


def find_peak(device_name: str, precision: str) -> Peak | None:
    """Return a device's peak from the table, or `None` if it is not listed.

    Args:
        device_name: the result of `torch.cuda.get_device_name`.
        precision: `bf16`, `fp16`, or `no` for float32, which means TF32.
    """
    if OTHERS.search(device_name):
        return None
    for name, (teraflops, source) in PEAK_FLOPS.items():
        if re.search(rf"\b{name}\b", device_name):
            if precision != "no":
                return Peak(teraflops * 1e12, source)
            return None if name in WITHOUT_TF32 else Peak(teraflops * 1e12 / 2, source)
    return None


def measure_peak_flops(device: torch.device, precision: str) -> float:
    """Measure the FLOP/s of a large square matrix product, the best of `N_PROBES`."""
    size = CPU_PROBE_SIZE if device.type == "cpu" else PROBE_SIZE
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    # Random values, because a power-limited device multiplies constants faster than real data.
    matrix = torch.randn(size, size, dtype=dtype, device=device)
    seconds = []
    for _ in range(N_PROBES + 1):  # the first warms up
        started = time.perf_counter()
        (matrix @ matrix)[0, 0].item()  # waits for the device
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds[1:])


def choose_peak(device: torch.device, precision: str, tf32: bool = True) -> Peak:
    """Return a device's peak from its data sheet, or else measured by a matrix product."""
    if device.type == "cuda" and (tf32 or precision != "no"):
        peak = find_peak(torch.cuda.get_device_name(device), precision)
        if peak is not None:
            return peak
    return Peak(measure_peak_flops(device, precision), "measured by a matrix product")
