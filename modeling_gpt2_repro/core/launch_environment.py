"""The environment variables that accelerate may read: those that start processes, none that change an experiment."""

import os

from modeling_gpt2_repro.core.errors import UserError

# Set by `accelerate launch` to start processes, or by users to choose a device and to debug. The launcher's precision
# only shows that there is a launcher: the experiment's is passed to accelerate and overrides it.
FLAGS = ("ACCELERATE_USE_CPU", "ACCELERATE_CPU_AFFINITY", "ACCELERATE_DEBUG_MODE", "ACCELERATE_ENABLE_RICH")
HEEDED = (*FLAGS, "ACCELERATE_MIXED_PRECISION", "ACCELERATE_LOG_LEVEL")
# Other ways to train, which a user's accelerate configuration may ask for, and which must not be ignored silently.
REFUSED = (
    "ACCELERATE_USE_DEEPSPEED",
    "ACCELERATE_USE_FSDP",
    "ACCELERATE_USE_MEGATRON_LM",
    "ACCELERATE_USE_SAGEMAKER",
    "ACCELERATE_USE_PARALLELISM_CONFIG",
    "ACCELERATE_TORCH_DEVICE",
)
# accelerate.utils.environment.str_to_bool
TRUE, FALSE = ("y", "yes", "t", "true", "on", "1"), ("n", "no", "f", "false", "off", "0")


def settle_environment() -> None:
    """Remove accelerate's other variables from this process's environment, before accelerate reads them.

    An experiment depends on its settings alone: `ACCELERATE_GRADIENT_ACCUMULATION_STEPS` divides no gradient, and
    `ACCELERATE_DYNAMO_BACKEND` compiles nothing.

    Raises:
        UserError: a variable asks for another way to train, or a flag is neither true nor false.
    """
    for name in [name for name in os.environ if name.startswith("ACCELERATE_") or name == "FORK_LAUNCHED"]:
        value = os.environ[name].lower()
        if name in FLAGS and value not in (*TRUE, *FALSE):
            raise UserError(f"the environment has {name}={os.environ[name]}: set it to true or false, or unset it")
        if name in REFUSED and value not in ("", *FALSE):
            raise UserError(
                f"the environment has {name}={os.environ[name]}, which these scripts do not do: unset it, or launch "
                "with --config_file accelerate_config.yaml; CUDA_VISIBLE_DEVICES chooses devices"
            )
        if name not in HEEDED:
            del os.environ[name]
