"""Starting accelerate's processes and devices, with numerical behavior determined by the experiment's settings alone.

Of accelerate's environment variables, those that start processes are kept, and those that would change an experiment
are removed or rejected.
"""

import os
import warnings
from datetime import timedelta

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import parse_flag_from_env

from .devices import is_out_of_memory, supports_bf16
from .errors import UserError
from .optional import not_none

# Rank 0 saves and draws while the other ranks wait in a collective.
PROCESS_GROUP_TIMEOUT = timedelta(hours=2)

# The values of CUBLAS_WORKSPACE_CONFIG with which cuBLAS is deterministic.
REPRODUCIBLE_CUBLAS = (":4096:8", ":16:8")

# Set by `accelerate launch` to start processes, or by users to choose a device and to debug. The launcher's precision
# is kept only as a sign of the launcher: the experiment's is passed to accelerate and overrides it.
FLAGS = ("ACCELERATE_USE_CPU", "ACCELERATE_CPU_AFFINITY", "ACCELERATE_DEBUG_MODE", "ACCELERATE_ENABLE_RICH")
KEPT_VARIABLES = (*FLAGS, "ACCELERATE_MIXED_PRECISION", "ACCELERATE_LOG_LEVEL")
# Other ways to train, which an accelerate configuration may request. They must not be ignored silently.
REFUSED_VARIABLES = (
    "ACCELERATE_USE_DEEPSPEED",
    "ACCELERATE_USE_FSDP",
    "ACCELERATE_USE_MEGATRON_LM",
    "ACCELERATE_USE_SAGEMAKER",
    "ACCELERATE_USE_PARALLELISM_CONFIG",
    "ACCELERATE_TORCH_DEVICE",
)
# accelerate.utils.environment.str_to_bool
TRUE, FALSE = ("y", "yes", "t", "true", "on", "1"), ("n", "no", "f", "false", "off", "0")


def start_accelerator(mixed_precision: str, *, tf32: bool = False, deterministic: bool = False) -> Accelerator:
    """Start accelerate with the precision of the experiment, which overrides the launcher's.

    `bf16` falls back to float32 on devices without it, `fp16` on devices other than CUDA, which have no loss scaling.

    Args:
        tf32: multiply float32 matrices in TF32 if the device supports it.
        deterministic: see `compute_deterministically`. Always on for CPUs, where it costs next to nothing.

    Raises:
        UserError: the launcher started more processes than there are devices, the processes cannot connect, or the
            environment requests an unsupported way to train.
    """
    sanitize_environment()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    compute_deterministically(deterministic)
    device = not_none(start_processes().device)
    if device.type == "cpu":
        compute_deterministically(True)
    if mixed_precision == "bf16" and not supports_bf16(device):
        mixed_precision = "no"
    if mixed_precision == "fp16" and device.type != "cuda":
        mixed_precision = "no"
    return Accelerator(mixed_precision=mixed_precision)


def sanitize_environment() -> None:
    """Remove accelerate variables that could change the experiment, before accelerate reads them.

    Settings alone define an experiment: `ACCELERATE_GRADIENT_ACCUMULATION_STEPS` must not divide gradients, nor
    `ACCELERATE_DYNAMO_BACKEND` compile the model.

    Raises:
        UserError: a variable requests an unsupported way to train, or a flag is neither true nor false.
    """
    for name in [name for name in os.environ if name.startswith("ACCELERATE_") or name == "FORK_LAUNCHED"]:
        value = os.environ[name].lower()
        if name in FLAGS and value not in (*TRUE, *FALSE):
            raise UserError(f"the environment has {name}={os.environ[name]}: set it to true or false, or unset it")
        if name in REFUSED_VARIABLES and value not in ("", *FALSE):
            raise UserError(
                f"the environment has {name}={os.environ[name]}, which is not supported: unset it, or launch with "
                "--config_file accelerate_config.yaml (CUDA_VISIBLE_DEVICES selects devices)"
            )
        if name not in KEPT_VARIABLES:
            del os.environ[name]


def start_processes() -> PartialState:
    """Initialize the process group, one device per process.

    Raises:
        UserError: there are fewer devices than processes, or the processes cannot connect.
    """
    n_launched, n_local = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    use_cpu = parse_flag_from_env("ACCELERATE_USE_CPU")
    if not use_cpu:
        check_driver()
        if torch.cuda.is_available() and n_local > (n_gpus := torch.cuda.device_count()):
            raise UserError(
                f"the launcher started {n_local} processes, but this machine has {n_gpus} GPU(s): "
                f"launch with --num_processes {n_gpus}"
            )
    try:
        state = PartialState(cpu=use_cpu, timeout=PROCESS_GROUP_TIMEOUT)
    except RuntimeError as error:
        if n_launched == 1 or is_out_of_memory(error):
            raise
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"the processes cannot connect to each other ({reason}): check the launcher's address and port "
            "(MASTER_ADDR, MASTER_PORT) and this machine's network interface (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME)"
        ) from error
    if n_launched != state.num_processes:
        raise UserError(
            f"the launcher started {n_launched} processes, but this machine has devices for {state.num_processes}: "
            "launch with --num_processes 1, or set ACCELERATE_USE_CPU=true"
        )
    return state


def check_driver() -> None:
    """Check that the driver is recent enough for this torch, which would otherwise silently use the CPU.

    Raises:
        UserError: the driver is too old.
    """
    with warnings.catch_warnings(action="ignore"):  # torch's own warning fills many lines
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
    """Restrict torch to deterministic operations, and its compiler to choosing kernels without timing them.

    An operation without a deterministic implementation then raises a `RuntimeError`. Call this before the first CUDA
    call: cuBLAS reads its setting once (https://docs.nvidia.com/cuda/cublas/#results-reproducibility).
    """
    if is_wanted:
        if os.environ.get("CUBLAS_WORKSPACE_CONFIG") not in REPRODUCIBLE_CUBLAS:
            os.environ["CUBLAS_WORKSPACE_CONFIG"] = REPRODUCIBLE_CUBLAS[0]
        # For debugging only: it costs a pass over every tensor.
        # pyrefly: ignore[missing-attribute]  torch adds this attribute to the module at import
        torch.utils.deterministic.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(is_wanted)
