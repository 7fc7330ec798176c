"""How fast a run trains, and how near that is to what its device can do."""

import contextlib
import re
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch

# Dense matrix products in bf16 or fp16 with float32 accumulation, in FLOP/s, as NVIDIA's data sheets and architecture
# white papers have them; where those quote twice the number, for sparse matrices, half of it. The first name whose
# words a device's own name holds is taken.
PEAK_FLOPS = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "A40": 149.7e12,
    "A30": 165e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 6000 Ada": 364e12,
    "RTX A6000": 154.8e12,
    "RTX 4090": 165.2e12,
    "RTX 3090 Ti": 80e12,
    "RTX 3090": 71e12,
    "V100": 125e12,
    "T4": 65e12,
}
# From the Ampere generation on TF32 runs at half the rate of bf16; the older two have none.
WITHOUT_TF32 = ("V100", "T4")

# The square matrix product in place of a data sheet: its size on a CPU and elsewhere, and how often it is timed.
CPU_PROBE_SIZE, PROBE_SIZE, N_PROBES = 2048, 8192, 5


class Clock:
    """Adds up where a run's time goes.

    Attributes:
        seconds: the durations of each activity, in order.
    """

    def __init__(self):
        self.seconds: dict[str, list[float]] = defaultdict(list)

    @contextlib.contextmanager
    def measure(self, activity: str) -> Iterator[None]:
        """Time what happens inside; an exception leaves no entry."""
        started = time.perf_counter()
        yield
        self.seconds[activity].append(time.perf_counter() - started)


def find_peak_flops(device_name: str, precision: str) -> float | None:
    """Return a device's peak in FLOP/s from the table, `None` for one that is not there.

    Args:
        device_name: as `torch.cuda.get_device_name` says it.
        precision: `bf16`, `fp16`, or `no` for float32, which means TF32.
    """
    if "Laptop" in device_name or " MIG " in device_name:  # less than the card of the same number
        return None
    for name, peak in PEAK_FLOPS.items():
        if re.search(rf"\b{name}\b", device_name):
            if precision != "no":
                return peak
            return None if name in WITHOUT_TF32 else peak / 2
    return None


def measure_peak_flops(device: torch.device, precision: str) -> float:
    """Return the FLOP/s of a large square matrix product, the best of a few: what the device was seen to do."""
    size = CPU_PROBE_SIZE if device.type == "cpu" else PROBE_SIZE
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    # Random, because a device at its limit of power multiplies ones faster than what training multiplies.
    matrix = torch.randn(size, size, dtype=dtype, device=device)
    seconds = []
    for _ in range(N_PROBES + 1):  # the first warms up
        started = time.perf_counter()
        (matrix @ matrix)[0, 0].item()  # waits for the device
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds[1:])


@dataclass(frozen=True)
class Peak:
    """What a device could do at most: `flops` a second, and `source`, where the number is from."""

    flops: float
    source: str


def choose_peak(device: torch.device, precision: str, tf32: bool = True) -> Peak:
    """Return a device's peak from its data sheet, or else as a short matrix product shows it."""
    if device.type == "cuda" and (tf32 or precision != "no"):
        flops = find_peak_flops(torch.cuda.get_device_name(device), precision)
        if flops is not None:
            return Peak(flops, "data sheet")
    return Peak(measure_peak_flops(device, precision), "measured by a matrix product")
