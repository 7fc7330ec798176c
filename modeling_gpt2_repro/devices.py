"""Facts about the device and the process that a script runs on."""

import ctypes
import gc
import os
import shutil
import sys
from datetime import timedelta

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import parse_flag_from_env
from accelerate.utils.memory import should_reduce_batch_size

from modeling_gpt2_repro.errors import UserError

# The first process draws and saves while the others wait in a collective.
PROCESS_GROUP_TIMEOUT = timedelta(hours=2)

# glibc's malloc.h
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4

# More tokens than this in one micro-step on a CPU only cost memory: the logits alone are 0.2 MB each.
CPU_MICRO_BATCH_TOKENS = 4096
ACCELERATOR_MICRO_BATCH_SIZE = 64


def start_accelerator(mixed_precision: str) -> Accelerator:
    """Start accelerate with a precision that the experiment chose, whatever the launcher says.

    `bf16` becomes float32 on a device that has none, and so does `fp16` off CUDA, where nothing scales its loss.

    Raises:
        UserError: the launcher started more processes than there are devices: they would share one, or each of them
            would believe to be alone.
    """
    use_cpu = parse_flag_from_env("ACCELERATE_USE_CPU")
    n_local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if torch.cuda.is_available() and not use_cpu and n_local > torch.cuda.device_count():
        raise UserError(
            f"the launcher started {n_local} processes, but this machine has {torch.cuda.device_count()} GPU(s): "
            f"launch with --num_processes {torch.cuda.device_count()}"
        )
    state = PartialState(cpu=use_cpu, timeout=PROCESS_GROUP_TIMEOUT)
    n_launched = int(os.environ.get("WORLD_SIZE", "1"))
    if n_launched != state.num_processes:
        raise UserError(
            f"the launcher started {n_launched} processes, but this machine has devices for {state.num_processes}: "
            "launch with --num_processes 1, or set ACCELERATE_USE_CPU=true"
        )
    if mixed_precision == "bf16" and not supports_bf16(state.device):
        mixed_precision = "no"
    if mixed_precision == "fp16" and state.device.type != "cuda":
        mixed_precision = "no"
    return Accelerator(mixed_precision=mixed_precision)


def get_largest_micro_batch_size(device: torch.device, sequence_length: int) -> int:
    """Return the sequences at once from which an automatic choice starts on this kind of device."""
    if device.type == "cpu":
        return max(1, CPU_MICRO_BATCH_TOKENS // sequence_length)
    return ACCELERATOR_MICRO_BATCH_SIZE


def prepare_cpu_process() -> None:
    """Let a process that computes on the CPU use all cores and keep the memory it frees. Call it before any work.

    `accelerate launch` exports OMP_NUM_THREADS=1 where the variable is not set, which a worker cannot tell from a
    choice of 1: who wants a single thread runs `python train.py`. Any other number that the user set stays.
    """
    was_launched = "ACCELERATE_MIXED_PRECISION" in os.environ
    is_chosen = "OMP_NUM_THREADS" in os.environ and not (was_launched and os.environ["OMP_NUM_THREADS"] == "1")
    if not is_chosen and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        torch.set_num_threads(count_cores())
    if (libc := load_glibc()) is not None:
        # It maps blocks as large as a step's logits anew each time, and each new page costs a fault: an eager step of
        # the demo spends two fifths of its time on them.
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


def return_freed_memory() -> None:
    """Give back to the system what this process has freed but keeps since `prepare_cpu_process`.

    For after work whose memory is of no use to what follows, like compiling: next to its remains, a training step's
    tensors find no room and the process grows.
    """
    gc.collect()
    if (libc := load_glibc()) is not None:
        libc.malloc_trim(0)


def load_glibc() -> ctypes.CDLL | None:
    """Return the C library if it is glibc, whose allocator can be told what to keep."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "gnu_get_libc_version"):
        return libc
    return None


def count_cores() -> int:
    """Return the cores that this process may run on, which a batch system may limit."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe_device(accelerator: Accelerator, wanted_precision: str) -> str:
    """Say what the run computes on and in which precision, and where that is not the one wanted."""
    device, precision = accelerator.device, accelerator.mixed_precision.replace("no", "float32")
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{device.type}, {torch.get_num_threads()} thread(s)" if device.type == "cpu" else device.type
    if accelerator.mixed_precision != wanted_precision:
        precision += f", because it has no {wanted_precision}"
    return f"{name}; {accelerator.num_processes} process(es); {precision}"


def supports_bf16(device: torch.device) -> bool:
    """Tell whether the device computes matrix products in bfloat16 itself (an emulation is slower than float32)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return False


def can_compile(device: torch.device) -> bool:
    """Tell whether `torch.compile` has the compiler that it needs for this device."""
    if device.type == "cuda":
        return True
    compiler = os.environ.get("CXX", "g++" if sys.platform == "linux" else "clang++")
    return device.type == "cpu" and shutil.which(compiler) is not None


def measure_peak_memory(device: torch.device) -> float:
    """Return the most memory that this process has held, in GB: of the device, or resident in case of a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource  # POSIX only

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1024 if sys.platform == "linux" else 1) / 1e9


def reset_peak_memory(device: torch.device) -> None:
    """Let `measure_peak_memory` begin anew, where the device counts: a CPU's process cannot."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def measure_total_memory() -> int | None:
    """Return the machine's memory in bytes; `None` where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def measure_free_memory(device: torch.device) -> int | None:
    """Return the bytes that this process could still take on a device; `None` where the system does not say."""
    if device.type == "cuda":
        # What torch keeps but does not use is free as well.
        return (
            torch.cuda.mem_get_info(device)[0]
            + torch.cuda.memory_reserved(device)
            - torch.cuda.memory_allocated(device)
        )
    if device.type != "cpu":
        return None
    try:
        with open("/proc/meminfo", encoding="ascii") as stream:
            sizes = dict(line.split(":") for line in stream)
    except OSError:
        return None
    return int(sizes["MemAvailable"].split()[0]) * 1024


def is_out_of_memory(error: RuntimeError) -> bool:
    """Tell whether an exception of torch's means that the device, or the machine, has no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)


def measure_private_memory() -> int | None:
    """Return this process's resident memory that mirrors no file, in bytes; `None` elsewhere than on Linux."""
    try:
        with open("/proc/self/statm", encoding="ascii") as stream:
            _, resident, shared = map(int, stream.read().split()[:3])
    except OSError:
        return None
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")
