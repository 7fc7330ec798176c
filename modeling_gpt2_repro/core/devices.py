"""The device of a process: cores, memory, precision and compiler support; and work that one rank does for all."""

import contextlib
import ctypes
import gc
import math
import os
import platform
import resource
import shutil
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list
from accelerate.utils.memory import should_reduce_batch_size

from .errors import UserError

CGROUP_FOLDER = Path("/sys/fs/cgroup")

# glibc's malloc.h
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4

# Out-of-memory messages of the driver, Triton, the compiler and cuBLAS, which raise other types than torch's own.
OUT_OF_MEMORY_SIGNS = (
    "CUDA error: out of memory",
    "[CUDA]: out of memory",
    "CUDA out of memory",
    "STATUS_ALLOC_FAILED",
)

# Packages that affect the results of a run.
VERSIONED_PACKAGES = (
    "modeling_gpt2_repro",
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "tokenizers",
    "gigatoken",
    "numpy",
)
# On a CPU, more tokens per micro-step cost memory without a speedup: the logits alone take 0.2 MB per token.
CPU_MICRO_BATCH_TOKENS = 4096
ACCELERATOR_MICRO_BATCH_SIZE = 64


def name_device(device: torch.device) -> torch.device:
    """Return the device with its index, which accelerate omits for the CUDA device of a single process."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def enter_device(device: torch.device) -> None:
    """Make a CUDA device the calling thread's current one."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def get_largest_micro_batch_size(device: torch.device, sequence_length: int) -> int:
    """Return the micro-batch size, in sequences, at which the automatic choice starts on this type of device."""
    if device.type == "cpu":
        return max(1, CPU_MICRO_BATCH_TOKENS // sequence_length)
    return ACCELERATOR_MICRO_BATCH_SIZE


def prepare_cpu_process() -> None:
    """Let a CPU process use all cores and keep the memory it frees. Call this before any work.

    `accelerate launch` exports OMP_NUM_THREADS=1 if the variable is unset, which a worker cannot distinguish from the
    user's choice: for a single thread, run `python train.py`. Any other value set by the user is kept.
    """
    was_launched = "ACCELERATE_MIXED_PRECISION" in os.environ
    is_chosen = "OMP_NUM_THREADS" in os.environ and not (was_launched and os.environ["OMP_NUM_THREADS"] == "1")
    if not is_chosen and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        torch.set_num_threads(count_cores())
    if (libc := load_glibc()) is not None:
        # By default glibc maps and unmaps blocks as large as a step's logits on every allocation, at a page fault per
        # page: two fifths of the time of an eager step of the demo.
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


def return_freed_memory() -> None:
    """Return to the system the freed memory that this process has kept since `prepare_cpu_process`.

    Call this after work such as compilation, which leaves fragments that a training step cannot reuse.
    """
    gc.collect()
    if (libc := load_glibc()) is not None:
        libc.malloc_trim(0)


def load_glibc() -> ctypes.CDLL | None:
    """Return the C library if it is glibc, whose allocator can be tuned."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "gnu_get_libc_version"):
        return libc
    return None


def count_cores() -> int:
    """Return the number of cores available to this process under its affinity mask and container limit."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = read_container_limit("cpu.max")
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def read_container_limit(name: str) -> float | None:
    """Return this container's `cpu.max` (in cores) or `memory.max` (in bytes); `None` for no limit.

    `cpu.max` is given in microseconds per period (https://docs.kernel.org/admin-guide/cgroup-v2.html).
    """
    try:
        limit, *period = (CGROUP_FOLDER / name).read_text(encoding="ascii").split()
        return int(limit) / int(period[0] if period else 1)
    except (OSError, ValueError):  # no cgroups, or "max"
        return None


def compute_once(function: Callable[[], Any], accelerator: Accelerator | PartialState) -> Any:
    """Call `function` on rank 0 and return its result on every rank.

    Raises:
        UserError: the call raised one, which is raised on every rank.
    """
    answer: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            answer[0] = function()
        except UserError as error:
            answer[1] = str(error)
    if accelerator.num_processes > 1:
        broadcast_object_list(answer)
    if answer[1] is not None:
        raise UserError(answer[1])
    return answer[0]


def name_hardware(accelerator: Accelerator) -> str:
    """Return the number and model of the devices, which determine the micro-batch size that fits."""
    return f"{accelerator.num_processes} x {_name_kind(accelerator.device)}"


def _name_kind(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def describe_device(accelerator: Accelerator, wanted_precision: str) -> str:
    """Describe the device, the processes and the precision, with a reason if it differs from the requested one."""
    device, precision = accelerator.device, accelerator.mixed_precision.replace("no", "float32")
    threads = f", {torch.get_num_threads()} thread(s)" if device.type == "cpu" else ""
    if accelerator.mixed_precision != wanted_precision:
        precision += f", because the device has no {wanted_precision}"
        if device.type == "cuda" and wanted_precision == "bf16":
            precision += " (--mixed_precision fp16 would be faster)"
    return f"{_name_kind(device)}{threads}; {accelerator.num_processes} process(es); {precision}"


def list_versions() -> dict[str, str]:
    """Return the versions of Python and of `VERSIONED_PACKAGES`."""
    versions = {"python": platform.python_version()}
    for package in VERSIONED_PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


def supports_bf16(device: torch.device) -> bool:
    """Return whether the device multiplies bfloat16 matrices in hardware (emulation is slower than float32)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return False


def can_compile(device: torch.device) -> bool:
    """Return whether the compiler that `torch.compile` needs for this device is installed."""
    if device.type == "cuda":
        return True
    compiler = os.environ.get("CXX", "g++" if sys.platform == "linux" else "clang++")
    return device.type == "cpu" and shutil.which(compiler) is not None


def measure_peak_memory(device: torch.device) -> float:
    """Return this process's peak memory in GB: allocated for a CUDA device, resident otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1024 if sys.platform == "linux" else 1) / 1e9


def reset_peak_memory(device: torch.device) -> None:
    """Reset the peak of `measure_peak_memory`, which is possible for CUDA devices only."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def measure_total_memory() -> int:
    """Return the total memory of the machine, or its container's limit, in bytes."""
    return int(min(psutil.virtual_memory().total, read_container_limit("memory.max") or math.inf))


def measure_device_memory(device: torch.device) -> int:
    """Return the bytes of a CUDA device that this process can use, including those it has reserved."""
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)


def measure_free_memory(device: torch.device) -> int | None:
    """Return the bytes that this process can still allocate on a device; `None` if unknown."""
    if device.type == "cuda":
        return measure_device_memory(device) - torch.cuda.memory_allocated(device)
    return psutil.virtual_memory().available if device.type == "cpu" else None


def measure_private_memory() -> int | None:
    """Return this process's resident memory that is not shared or file-backed, in bytes; `None` except on Linux."""
    memory = psutil.Process().memory_info()
    return memory.rss - memory.shared if sys.platform == "linux" else None


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an exception from torch means that the device or the machine ran out of memory."""
    is_known = isinstance(error, torch.OutOfMemoryError | MemoryError) or should_reduce_batch_size(error)
    return is_known or any(sign in str(error) for sign in OUT_OF_MEMORY_SIGNS)
