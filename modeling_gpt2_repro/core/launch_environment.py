"""What accelerate takes from the environment: the start of processes, and nothing that would change an experiment."""

import os

from modeling_gpt2_repro.core.errors import UserError

# `accelerate launch` sets these to start processes, or users to choose a device and to look for errors. Its precision
# is a sign of the launcher alone: ours is passed to accelerate, and wins.
FLAGS = ("ACCELERATE_USE_CPU", "ACCELERATE_CPU_AFFINITY", "ACCELERATE_DEBUG_MODE", "ACCELERATE_ENABLE_RICH")
HEEDED = (*FLAGS, "ACCELERATE_MIXED_PRECISION", "ACCELERATE_LOG_LEVEL")
# Other ways to train, which a user's own accelerate configuration may ask for, and which silence would not serve.
REFUSED = (
    *("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_MEGATRON_LM", "ACCELERATE_USE_SAGEMAKER"),
    *("ACCELERATE_USE_PARALLELISM_CONFIG", "ACCELERATE_TORCH_DEVICE"),
)
# accelerate.utils.environment.str_to_bool
TRUE, FALSE = ("y", "yes", "t", "true", "on", "1"), ("n", "no", "f", "false", "off", "0")


def settle_environment() -> None:
    """Take accelerate's other variables out of this process's environment, before accelerate reads them.

    So `ACCELERATE_GRADIENT_ACCUMULATION_STEPS` divides no gradient, and `ACCELERATE_DYNAMO_BACKEND` compiles nothing:
    an experiment is what its settings say.

    Raises:
        UserError: a variable asks for another way to train, or is no flag.
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
