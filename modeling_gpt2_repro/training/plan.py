"""The arithmetic of a run: what it costs and how long it takes, before it starts and while it goes on."""

from dataclasses import dataclass

from torch import nn

from modeling_gpt2_repro.training.config import TrainingConfig
from modeling_gpt2_repro.training.console import format_duration
from modeling_gpt2_repro.training.preflight import estimate_disk_bytes

# A forward pass alone is a third of the work of forward and backward.
FORWARD_SHARE = 1 / 3
# HellaSwag's validation split, and the tokens that a model reads of an item in the `original` protocol, the context
# once: GPT-2's, the mean of all items.
HELLASWAG_ITEMS, TOKENS_PER_HELLASWAG_ITEM = 10_042, 159
EXAMPLE_RATES = (1e3, 1e4, 1e5, 1e6)
EXAMPLE_PROCESSES = (1, 2, 4, 8)


@dataclass(frozen=True)
class Plan:
    """How the work is divided and how much of it there is.

    Args:
        micro_batch_size: sequences that a process takes at once.
        first_step: completed updates at the start, above 0 when resumed.
        max_steps: updates of the whole run.
        last_step: completed updates at which to stop: `max_steps`, or fewer to try a run out.
        n_windows: sequences in an epoch; `None` before there are data.
        n_parameters: of the model, the tied embedding once.
        flops_per_token: of training, forward and backward.
        eval_tokens, hellaswag_tokens: tokens that one evaluation of each kind reads.
    """

    n_processes: int
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
        """Tell whether what happens every `every` steps (0: never), and at the end, happens after `step` updates."""
        return every > 0 and (step % every == 0 or step == self.last_step)

    def is_eval_step(self, config: TrainingConfig, step: int) -> bool:
        """Tell whether the model after `step` updates is validated, scored or sampled, or is the last one."""
        every = (config.eval_every, config.hellaswag_every, config.sample_every)
        return step == self.last_step or any(self.is_due(each, step) for each in every)

    def count_due(self, every: int) -> int:
        """Return how often that happens in the rest of the whole run, its start included."""
        if every == 0:
            return 0
        return self.max_steps // every - self.first_step // every + 1 + (self.max_steps % every > 0)

    def count_micro_steps(self, config: TrainingConfig) -> int:
        """Return the micro-steps in which each process makes its share of an update."""
        return config.windows_per_step // (self.n_processes * self.micro_batch_size)

    def count_training_tokens(self, config: TrainingConfig) -> int:
        """Return the tokens of the updates that are left."""
        return (self.max_steps - self.first_step) * config.tokens_per_step

    def count_evaluation_tokens(self, config: TrainingConfig) -> int:
        """Return the tokens that validation and HellaSwag read in the rest of the run."""
        return self.count_due(config.eval_every) * self.eval_tokens + (
            self.count_due(config.hellaswag_every) * self.hellaswag_tokens
        )

    def estimate_seconds(self, config: TrainingConfig, tokens_per_second: float) -> float:
        """Return how long the rest of the run takes at a rate of all processes together, evaluations included."""
        work = self.count_training_tokens(config) + FORWARD_SHARE * self.count_evaluation_tokens(config)
        return work / tokens_per_second

    def estimate_disk_bytes(self, config: TrainingConfig) -> int:
        """Return the disk that the run takes at most."""
        n_saves = max(1, self.count_due(config.save_every) - 1)  # none at step 0, and one when it is asked to stop
        n_kept = self.max_steps // config.keep_weights_every if config.keep_weights_every else 0
        n_best = 2 if config.save_best else 0  # one more while it is replaced
        n_waiting = n_saves if config.push_to_hub else 0  # for a Hub that is out of reach until the end
        n_models = n_kept + n_best + n_waiting
        return estimate_disk_bytes(self.n_parameters, n_saves, config.keep_checkpoints, n_models)

    def describe_length(self, config: TrainingConfig) -> str:
        """Say how many steps and epochs the run has."""
        warmup = f"warm-up {config.warmup_steps:,} steps"
        if config.warmup_steps > self.max_steps:
            warmup += " (which the run does not reach the end of)"
        if self.n_windows is None:
            epochs = "an unknown part of the data, which are not prepared yet"
        else:
            epochs = f"{self.max_steps * config.windows_per_step / self.n_windows:.3f} epochs"
        tokens = self.max_steps * config.tokens_per_step
        return f"length      {self.max_steps:,} steps = {epochs}, {tokens:,} tokens; {warmup}"

    def describe_step(self, config: TrainingConfig) -> str:
        """Say what an optimizer step is made of."""
        return (
            f"step        {config.tokens_per_step:,} tokens = {self.n_processes} process(es) x "
            f"{self.count_micro_steps(config)} micro-step(s) x {self.micro_batch_size} sequence(s) x "
            f"{config.sequence_length:,} tokens"
        )

    def describe_costs(self, config: TrainingConfig) -> list[str]:
        """Say what the whole run costs, and how long it is at a few rates."""
        lines = [f"model       {self.n_parameters:,} parameters", self.describe_step(config)]
        for n_processes in EXAMPLE_PROCESSES:
            if n_processes != self.n_processes and config.windows_per_step % n_processes == 0:
                size = next(size for size in config.list_divisors(n_processes) if size <= self.micro_batch_size)
                micro_steps = config.windows_per_step // n_processes // size
                lines.append(
                    f"            on {n_processes} process(es) {micro_steps} micro-step(s) x {size} sequence(s)"
                )
        training = self.count_training_tokens(config)
        evaluation = self.count_evaluation_tokens(config)
        disk = self.estimate_disk_bytes(config)
        rates = [config.plan_tokens_per_second] if config.plan_tokens_per_second else EXAMPLE_RATES
        durations = (
            f"{format_duration(self.estimate_seconds(config, rate))} at {rate:,.0f} tokens/s" for rate in rates
        )
        return [
            *lines,
            self.describe_length(config),
            f"arithmetic  {self.flops_per_token:,} FLOPs a token, forward and backward (6 N + 12 L d T: PaLM paper, "
            f"appendix B), {training * self.flops_per_token:.3g} in all",
            f"evaluation  {self.count_due(config.eval_every):,} x {self.eval_tokens:,} validation tokens and "
            f"{self.count_due(config.hellaswag_every):,} x {self.hellaswag_tokens:,} HellaSwag tokens: "
            f"{FORWARD_SHARE * evaluation / training:.1%} of the work of training on top",
            f"disk        up to {disk / 1e9:.1f} GB",
            f"time        {', '.join(durations)}",
        ]

    def count_progress(self, step: int, config: TrainingConfig) -> dict[str, float]:
        """Return epochs, tokens and floating-point operations after `step` updates."""
        tokens = step * config.tokens_per_step
        return {
            "train/epoch": step * config.windows_per_step / self.n_windows,
            "train/tokens": tokens,
            "train/flops": tokens * self.flops_per_token,
        }


def count_flops_per_token(model: nn.Module, sequence_length: int) -> int:
    """Return the floating-point operations that training spends on a token, forward and backward.

    6 N + 12 L d T (PaLM paper, appendix B), with N the parameters of the matrices a token passes through: all but the
    position embedding, the tied token embedding once, for the head.
    """
    config = model.config
    n_parameters = model.num_parameters() - config.max_position_embeddings * config.hidden_size
    return 6 * n_parameters + 12 * config.num_hidden_layers * config.hidden_size * sequence_length
