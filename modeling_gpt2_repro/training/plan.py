"""The arithmetic of a run: its steps, cost and duration."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator
from transformers import PreTrainedModel

from ..core.devices import ACCELERATOR_MICRO_BATCH_SIZE, get_largest_micro_batch_size
from ..core.optional import not_none
from ..data.dataset import TokenDataset
from ..data.shards import load_manifest
from ..evaluation.hellaswag_data import load_hellaswag
from .building import build_skeleton
from .config import SMOKE_STEPS, TrainingConfig
from .console import format_duration
from .inputs import Inputs
from .preflight import estimate_disk_bytes
from .start import Start

GPT2_VOCAB_SIZE = 50257
# A forward pass is a third of the work of forward and backward.
FORWARD_SHARE = 1 / 3
# Items in HellaSwag's validation split, and the mean of GPT-2 tokens read per item in the `original` protocol, with
# the context read once.
HELLASWAG_ITEMS, TOKENS_PER_HELLASWAG_ITEM = 10_042, 159
EXAMPLE_RATES = (1e3, 1e4, 1e5, 1e6)
EXAMPLE_PROCESSES = (1, 2, 4, 8)


@dataclass(frozen=True)
class Plan:
    """The amount of work of a run, and how it is divided.

    Args:
        micro_batch_sizes: sizes to try, in sequences, largest first.
        micro_batch_size: sequences per process and micro-step.
        first_step: completed updates at the start; above 0 when resumed.
        max_steps: updates of the whole run.
        last_step: completed updates at which to stop: `max_steps`, or fewer in a smoke test.
        n_windows: sequences per epoch; `None` if the data are not prepared yet.
        n_parameters: parameters of the model, counting the tied embedding once.
        flops_per_token: floating-point operations of training per token, forward and backward.
        eval_tokens, hellaswag_tokens: tokens read by one evaluation of each kind.
    """

    config: TrainingConfig
    n_processes: int
    micro_batch_sizes: list[int]
    micro_batch_size: int
    first_step: int
    max_steps: int
    last_step: int
    n_windows: int | None
    n_parameters: int
    flops_per_token: int
    eval_tokens: int
    hellaswag_tokens: int

    def is_due(self, every: int, step: int) -> bool:
        """Return whether an action of every `every` steps (0: never) is due at `step`; the last step always counts."""
        return every > 0 and (step % every == 0 or step == self.last_step)

    def is_eval_step(self, step: int) -> bool:
        """Return whether validation, HellaSwag or a sample is due at `step`."""
        config = self.config
        return any(
            self.is_due(each, step) for each in (config.eval_every, config.hellaswag_every, config.sample_every)
        )

    def count_due(self, every: int) -> int:
        """Count how often such an action is due in the rest of the run, including its first step."""
        if every == 0:
            return 0
        return self.max_steps // every - self.first_step // every + 1 + (self.max_steps % every > 0)

    @property
    def n_micro_steps(self) -> int:
        """Micro-steps per update and process."""
        return self.config.windows_per_step // (self.n_processes * self.micro_batch_size)

    @property
    def training_tokens(self) -> int:
        """Training tokens left."""
        return (self.max_steps - self.first_step) * self.config.tokens_per_step

    @property
    def evaluation_tokens(self) -> int:
        """Tokens that validation and HellaSwag will read in the rest of the run."""
        validation = self.count_due(self.config.eval_every) * self.eval_tokens
        return validation + self.count_due(self.config.hellaswag_every) * self.hellaswag_tokens

    def estimate_seconds(self, tokens_per_second: float) -> float:
        """Return the seconds that the rest of the run takes at a given total throughput, including evaluations."""
        return (self.training_tokens + FORWARD_SHARE * self.evaluation_tokens) / tokens_per_second

    def estimate_disk_bytes(self) -> int:
        """Return an upper bound of the disk space that the run takes."""
        config = self.config
        n_saves = max(1, self.count_due(config.save_every) - 1)  # none at step 0; one when stopped
        n_kept = self.max_steps // config.keep_weights_every if config.keep_weights_every else 0
        n_best = 2 if config.save_best else 0  # two while one replaces the other
        n_waiting = n_saves if config.push_to_hub else 0  # uploads queue up while the Hub is unreachable
        n_models = n_kept + n_best + n_waiting
        return estimate_disk_bytes(self.n_parameters, n_saves, config.keep_checkpoints, n_models)

    def count_progress(self, step: int) -> dict[str, float]:
        """Return epochs, tokens and floating-point operations after `step` updates."""
        tokens = step * self.config.tokens_per_step
        return {
            "train/epoch": step * self.config.windows_per_step / not_none(self.n_windows),
            "train/tokens": tokens,
            "train/flops": tokens * self.flops_per_token,
        }

    def describe_length(self) -> str:
        """Describe the run's length in steps, epochs and tokens."""
        config, epochs = self.config, "an unknown number of epochs (the data are not prepared yet)"
        warmup = f"warm-up {config.warmup_steps:,} steps"
        if config.warmup_steps > self.max_steps:
            warmup += " (longer than the run)"
        if self.n_windows is not None:
            epochs = f"{self.max_steps * config.windows_per_step / self.n_windows:.3f} epochs"
        tokens = self.max_steps * config.tokens_per_step
        return f"length      {self.max_steps:,} steps = {epochs}, {tokens:,} tokens; {warmup}"

    def describe_step(self) -> str:
        """Describe how an optimizer step is divided."""
        return (
            f"step        {self.config.tokens_per_step:,} tokens = {self.n_processes} process(es) x "
            f"{self.n_micro_steps} micro-step(s) x {self.micro_batch_size} sequence(s) x "
            f"{self.config.sequence_length:,} tokens"
        )

    def describe_costs(self) -> list[str]:
        """Describe the cost of the whole run, and its duration at a few rates."""
        config, training, evaluation = self.config, self.training_tokens, self.evaluation_tokens
        rates = [config.plan_tokens_per_second] if config.plan_tokens_per_second else EXAMPLE_RATES
        durations = [f"{format_duration(self.estimate_seconds(rate))} at {rate:,.0f} tokens/s" for rate in rates]
        return [
            f"model       {self.n_parameters:,} parameters",
            self.describe_step(),
            *self._describe_other_processes(),
            self.describe_length(),
            f"arithmetic  {self.flops_per_token:,} FLOPs per token, forward and backward (6 N + 12 L d T: PaLM paper, "
            f"appendix B), {training * self.flops_per_token:.3g} in total",
            f"evaluation  {self.count_due(config.eval_every):,} x {self.eval_tokens:,} validation tokens and "
            f"{self.count_due(config.hellaswag_every):,} x {self.hellaswag_tokens:,} HellaSwag tokens: "
            f"adds {FORWARD_SHARE * evaluation / training:.1%} to the work of training",
            f"disk        up to {self.estimate_disk_bytes() / 1e9:.1f} GB",
            f"time        {', '.join(durations)}",
        ]

    def _describe_other_processes(self) -> Iterator[str]:
        windows = self.config.windows_per_step
        for n_processes in EXAMPLE_PROCESSES:
            if n_processes != self.n_processes and windows % n_processes == 0:
                size = next(each for each in self.config.list_divisors(n_processes) if each <= self.micro_batch_size)
                micro_steps = windows // n_processes // size
                yield f"            on {n_processes} process(es) {micro_steps} micro-step(s) x {size} sequence(s)"


def build_plan(
    config: TrainingConfig, inputs: Inputs, start: Start, model: PreTrainedModel, accelerator: Accelerator
) -> Plan:
    """Plan a run with the largest micro-batch size to try.

    Raises:
        UserError: a step cannot be divided among the processes.
    """
    largest = get_largest_micro_batch_size(accelerator.device, config.sequence_length)
    sizes = config.list_micro_batch_sizes(accelerator.num_processes, largest)
    return Plan(
        config=config,
        n_processes=accelerator.num_processes,
        micro_batch_sizes=sizes,
        micro_batch_size=sizes[0],
        first_step=start.step,
        max_steps=start.max_steps,
        last_step=min(start.max_steps, SMOKE_STEPS) if config.smoke else start.max_steps,
        n_windows=len(not_none(inputs.train_set)),
        n_parameters=model.num_parameters(),
        flops_per_token=count_flops_per_token(model, config.sequence_length),
        eval_tokens=min(config.eval_tokens, inputs.val_set.n_tokens) if inputs.val_set else 0,
        hellaswag_tokens=inputs.hellaswag.encode("original").n_tokens if inputs.hellaswag else 0,
    )


def describe_plan(config: TrainingConfig) -> list[str]:
    """Describe the arithmetic of a run from its settings and, if prepared, its data; needs no device.

    The micro-batch size is the first that a GPU would try.

    Raises:
        UserError: the settings are invalid, or neither data nor `max_steps` are given.
    """
    n_windows, eval_tokens, vocab_size = None, config.eval_tokens, GPT2_VOCAB_SIZE
    if Path(config.data_dir).is_dir() or config.max_steps is None:
        manifest = load_manifest(config.data_dir)
        vocab_size = manifest.vocab_size if manifest is not None else GPT2_VOCAB_SIZE
        n_windows = len(TokenDataset(config.data_dir, "train", config.sequence_length, vocab_size))
        if config.eval_every:
            val_set = TokenDataset(config.data_dir, "val", config.sequence_length, vocab_size)
            eval_tokens = min(eval_tokens, val_set.n_tokens)
    n_items = min(config.hellaswag_limit or HELLASWAG_ITEMS, HELLASWAG_ITEMS)
    if config.hellaswag_every and config.hellaswag_file is not None:
        n_items = len(load_hellaswag(config.hellaswag_file, config.hellaswag_limit))
    n_processes, model = int(os.environ.get("WORLD_SIZE", "1")), build_skeleton(config, vocab_size)
    sizes = config.list_micro_batch_sizes(n_processes, ACCELERATOR_MICRO_BATCH_SIZE)
    max_steps = config.derive_max_steps(n_windows or 0)
    plan = Plan(
        config=config,
        n_processes=n_processes,
        micro_batch_sizes=sizes,
        micro_batch_size=sizes[0],
        first_step=0,
        max_steps=max_steps,
        last_step=max_steps,
        n_windows=n_windows,
        n_parameters=model.num_parameters(),
        flops_per_token=count_flops_per_token(model, config.sequence_length),
        eval_tokens=eval_tokens,
        hellaswag_tokens=TOKENS_PER_HELLASWAG_ITEM * n_items,
    )
    return plan.describe_costs()


def count_flops_per_token(model: PreTrainedModel, sequence_length: int) -> int:
    """Return the floating-point operations of training per token, forward and backward.

    6 N + 12 L d T (PaLM paper, appendix B), where N counts the parameters in matrix products: all but the position
    embedding, and the tied token embedding once, as the head.
    """
    config = model.config
    n_parameters = model.num_parameters() - config.max_position_embeddings * config.hidden_size
    return 6 * n_parameters + 12 * config.num_hidden_layers * config.hidden_size * sequence_length
