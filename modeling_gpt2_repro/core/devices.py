"""Facts about the device and the process that a script runs on."""

import contextlib
import ctypes
import gc
import math
import os
import platform
import shutil
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env
from accelerate.utils.memory import should_reduce_batch_size

from modeling_gpt2_repro.core.errors import UserError
from modeling_gpt2_repro.core.launch_environment import settle_environment

# The first process draws and saves while the others wait in a collective.
PROCESS_GROUP_TIMEOUT = timedelta(hours=2)

CGROUP_FOLDER = Path("/sys/fs/cgroup")

# glibc's malloc.h
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4

# Of the driver, of Triton, of the compiler that met one, and of cuBLAS, which do not raise torch's own exception.
OUT_OF_MEMORY_SIGNS = (
    "CUDA error: out of memory",
    "[CUDA]: out of memory",
    "CUDA out of memory",
    "STATUS_ALLOC_FAILED",
)

# The values of CUBLAS_WORKSPACE_CONFIG with which cuBLAS gives the same bits at every call.
REPRODUCIBLE_CUBLAS = (":4096:8", ":16:8")

# What a run computes with.
VERSIONED_PACKAGES = (
    *("modeling_gpt2_repro", "torch", "transformers", "accelerate"),
    *("datasets", "tokenizers", "gigatoken", "numpy"),
)
# More tokens than this in one micro-step on a CPU only cost memory: the logits alone are 0.2 MB each.
CPU_MICRO_BATCH_TOKENS = 4096
ACCELERATOR_MICRO_BATCH_SIZE = 64


def start_accelerator(mixed_precision: str, *, tf32: bool = False, deterministic: bool = False) -> Accelerator:
    """Start accelerate with a precision that the experiment chose, whatever the launcher says.

    `bf16` becomes float32 on a device that has none, and so does `fp16` off CUDA, where nothing scales its loss.

    Args:
        tf32: let products of float32 matrices run in TF32 where the device has it.
        deterministic: see `compute_deterministically`. On a CPU, where it costs next to nothing, it always holds.

    Raises:
        UserError: the launcher started more processes than there are devices: they would share one, or each of them
            would believe to be alone; or the environment asks for another way to train.
    """
    settle_environment()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    compute_deterministically(deterministic)
    use_cpu = parse_flag_from_env("ACCELERATE_USE_CPU")
    if not use_cpu:
        check_driver()
    n_local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if torch.cuda.is_available() and not use_cpu and n_local > torch.cuda.device_count():
        raise UserError(
            f"the launcher started {n_local} processes, but this machine has {torch.cuda.device_count()} GPU(s): "
            f"launch with --num_processes {torch.cuda.device_count()}"
        )
    try:
        state = PartialState(cpu=use_cpu, timeout=PROCESS_GROUP_TIMEOUT)
    except RuntimeError as error:
        if int(os.environ.get("WORLD_SIZE", "1")) == 1 or is_out_of_memory(error):
            raise
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"the processes do not find each other ({reason}): look at the launcher's address and port (MASTER_ADDR, "
            "MASTER_PORT), and at GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME, which name a network of this machine"
        ) from error
    if state.device.type == "cpu":
        compute_deterministically(True)
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


def check_driver() -> None:
    """Raise a `UserError` for a driver too old for this torch, which would take the machine for one without a GPU."""
    with warnings.catch_warnings(action="ignore"):  # says the same in many lines
        if torch.version.cuda is None or torch.cuda.is_available():
            return
        try:
            torch.cuda.init()
        except RuntimeError as error:
            if "driver" in str(error) and ("too old" in str(error) or "insufficient" in str(error)):
                found = str(error).partition("(")[2].partition(")")[0] or "of an unknown version"
                raise UserError(
                    f"the NVIDIA driver ({found}) is too old for torch {torch.__version__}: update the driver, "
                    "install a torch built for it (https://pytorch.org), or set ACCELERATE_USE_CPU=true"
                ) from error


def compute_deterministically(is_wanted: bool) -> None:
    """Let torch use only operations that give the same bits at every call, and the compiler choose without timing.

    An operation that has no such form raises a `RuntimeError` when it is called. Call it before the first CUDA call:
    cuBLAS reads its setting once (https://docs.nvidia.com/cuda/cublas/#results-reproducibility).
    """
    if is_wanted:
        if os.environ.get("CUBLAS_WORKSPACE_CONFIG") not in REPRODUCIBLE_CUBLAS:
            os.environ["CUBLAS_WORKSPACE_CONFIG"] = REPRODUCIBLE_CUBLAS[0]
        torch.utils.deterministic.fill_uninitialized_memory = False  # finds bugs, and costs a pass over every tensor
    torch.use_deterministic_algorithms(is_wanted)


def name_device(device: torch.device) -> torch.device:
    """Return a CUDA device with its index, which accelerate leaves out for a lone process; others as they are."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def enter_device(device: torch.device) -> None:
    """Make a CUDA device the current one of the calling thread."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


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
    """Return the cores that this process may run on, which a batch system or a container may limit."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = read_container_limit("cpu.max")
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def read_container_limit(name: str) -> float | None:
    """Return what `cpu.max` or `memory.max` of this container allows, in cores or bytes; `None` for no limit.

    See https://docs.kernel.org/admin-guide/cgroup-v2.html; a `cpu.max` is microseconds in a period of so many.
    """
    try:
        limit, *period = (CGROUP_FOLDER / name).read_text(encoding="ascii").split()
        return int(limit) / int(period[0] if period else 1)
    except (OSError, ValueError):  # no cgroups, or "max"
        return None


def compute_once(function: Callable[[], Any], accelerator: Accelerator) -> Any:
    """Return `function()`, which the first process alone computes, in every process.

    Raises:
        UserError: it did, in every process.
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
    """Return what tells devices apart on which the same micro-batch fits: their number and kind."""
    device = accelerator.device
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{accelerator.num_processes} x {kind}"


def describe_device(accelerator: Accelerator, wanted_precision: str) -> str:
    """Say what the run computes on and in which precision, and where that is not the one wanted."""
    device, precision = accelerator.device, accelerator.mixed_precision.replace("no", "float32")
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{device.type}, {torch.get_num_threads()} thread(s)" if device.type == "cpu" else device.type
    if accelerator.mixed_precision != wanted_precision:
        precision += f", because it has no {wanted_precision}"
        if device.type == "cuda" and wanted_precision == "bf16":
            precision += " (--mixed_precision fp16 would be faster)"
    return f"{name}; {accelerator.num_processes} process(es); {precision}"


def list_versions() -> dict[str, str]:
    """Return the versions of what a run computes with."""
    versions = {"python": platform.python_version()}
    for package in VERSIONED_PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


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
    """Return the memory of the machine, or of its container, in bytes; `None` where the system does not say."""
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None
    return int(min(memory, read_container_limit("memory.max") or memory))


def measure_device_memory(device: torch.device) -> int:
    """Return the bytes of a CUDA device that this process could have for itself, what it holds already included."""
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)


def measure_free_memory(device: torch.device) -> int | None:
    """Return the bytes that this process could still take on a device; `None` where the system does not say."""
    if device.type == "cuda":
        return measure_device_memory(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    try:
        with open("/proc/meminfo", encoding="ascii") as stream:
            sizes = dict(line.split(":") for line in stream)
    except OSError:
        return None
    return int(sizes["MemAvailable"].split()[0]) * 1024


def is_out_of_memory(error: Exception) -> bool:
    """Tell whether an exception of torch's means that the device, or the machine, has no memory left."""
    is_known = isinstance(error, torch.OutOfMemoryError | MemoryError) or should_reduce_batch_size(error)
    return is_known or any(sign in str(error) for sign in OUT_OF_MEMORY_SIGNS)


def measure_private_memory() -> int | None:
    """Return this process's resident memory that mirrors no file, in bytes; `None` elsewhere than on Linux."""
    try:
        with open("/proc/self/statm", encoding="ascii") as stream:
            _, resident, shared = map(int, stream.read().split()[:3])
    except OSError:
        return None
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")
