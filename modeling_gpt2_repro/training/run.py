"""A training run, built in steps: model and optimizer, plan, device, record. `train.py` has the loop."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from accelerate import Accelerator

from ..core.devices import describe_device, name_hardware, reset_peak_memory
from ..core.optional import not_none
from ..data.order import WindowOrder
from ..data.text_bytes import NOTE
from ..evaluation.samples import encode_prompt
from ..model.limits import get_max_positions
from ..modeling_gpt2_repro import GPT2ReproForCausalLM
from .building import build_model
from .checkpoint import TrainingState, is_own_checkpoint, list_checkpoints
from .config import TrainingConfig
from .console import Console, format_duration
from .device_fit import fit_to_device, place_on_device
from .inputs import Inputs
from .memory import StepMemory, describe_step_memory
from .optim import build_adamw
from .plan import Plan, build_plan
from .preflight import check_disk, check_duration, measure_folder
from .record import RunRecord
from .schedule import Schedule
from .start import Start
from .throughput import Clock, Peak, choose_peak


@dataclass
class Run:
    """Everything that the training loop uses.

    Attributes:
        order: the windows of each update.
        model: the plain module, for evaluation, sampling and saving.
        loss_model: its compiled and distributed wrapper, for training.
        n_overflows: consecutive updates with an infinite gradient, up to the last one.
    """

    config: TrainingConfig
    inputs: Inputs
    start: Start
    plan: Plan
    schedule: Schedule
    order: WindowOrder
    accelerator: Accelerator
    record: RunRecord
    console: Console
    model: GPT2ReproForCausalLM
    loss_model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    peak: Peak
    clock: Clock = field(default_factory=Clock)
    n_overflows: int = 0

    def is_eval_due(self, step: int) -> bool:
        """Return whether to evaluate the model after `step` updates.

        A resumed run skips its first evaluation if the checkpoint was saved after it; a smoke test always skips it.
        """
        skips_first = self.start.state.is_evaluated if self.start.state else self.config.smoke
        return self.plan.is_eval_step(step) and not (step == self.plan.first_step and skips_first)

    def is_save_due(self, step: int, stop: bool) -> bool:
        """Return whether to save the model after `step` updates; a stopped smoke test saves nothing."""
        if step == self.plan.first_step or (stop and self.config.smoke):
            return False
        return stop or self.plan.is_due(self.config.save_every, step)

    def is_skipped(self, step: int) -> bool:
        """Return whether to skip update `step + 1`."""
        return any(step + 1 in skip for skip in self.start.skips)

    def describe_state(self, step: int, is_evaluated: bool) -> TrainingState:
        """Return the state to save in the checkpoint after `step` updates."""
        return TrainingState(
            step=step,
            tokens=step * self.config.tokens_per_step,
            experiment=self.start.experiment,
            skips=self.start.skips,
            tracker_run_id=self.record.tracker_run_id,
            is_evaluated=is_evaluated,
            micro_batch_size=self.plan.micro_batch_size,
            hardware=name_hardware(self.accelerator),
        )

    def resume_hint(self) -> str:
        """Describe how to resume the run if it ends now."""
        requested, folder = self.config.resume_from_checkpoint, self.record.folder.checkpoints
        if not list_checkpoints(folder):
            return "there is no checkpoint yet, and the same command starts the run again"
        goes_back = requested == "never" or (requested != "auto" and is_own_checkpoint(requested, folder))
        command = "the same command with --resume_from_checkpoint auto" if goes_back else "the same command"
        return f"{command} resumes from the last checkpoint"


def build_run(
    config: TrainingConfig, inputs: Inputs, start: Start, accelerator: Accelerator, record: RunRecord, console: Console
) -> Run:
    """Build a run, and print what it will do.

    Failures that would come late, such as a full disk, are checked here, before the first step. The record is opened
    last.

    Raises:
        UserError: a check of model, batch, memory, disk or duration failed.
    """
    model, memory, optimizer = build_model_and_optimizer(config, inputs, start, accelerator)
    plan = build_plan(config, inputs, start, model, accelerator)
    if accelerator.is_main_process:
        folder = record.folder.checkpoints  # may be on another disk, and takes most of a run's space
        check_disk(folder, plan.estimate_disk_bytes() - measure_folder(folder))
    peak = choose_peak(accelerator.device, accelerator.mixed_precision, config.tf32)
    console.say(f"run         {record.folder}, trackers: {' and '.join(record.trackers) or 'none'}")
    console.say(*describe_run(plan, inputs, start, accelerator, peak))
    train_set = not_none(inputs.train_set)
    fit, optimizer = fit_to_device(plan, memory, start, train_set, model, optimizer, accelerator, console.say)
    plan = replace(plan, micro_batch_size=fit.micro_batch_size)
    seconds = plan.estimate_seconds(accelerator.num_processes / fit.seconds_per_token)
    check_duration(seconds, accelerator.device.type, is_accepted=config.yes or config.smoke)
    console.say(*describe_work(plan, start, seconds))
    # Record all skips, including the checkpoint's. In trackers, a forked run is a new run.
    recorded = replace(config, skip_steps=[f"{skip.start}:{skip.stop - 1}" for skip in start.skips])
    record.start(recorded, start.resumed_step, start.state.tracker_run_id if start.state and start.is_own else None)
    reset_peak_memory(accelerator.device)
    return Run(
        config=config,
        inputs=inputs,
        start=start,
        plan=plan,
        schedule=config.build_schedule(start.max_steps),
        order=WindowOrder(len(train_set), config.seed, config.first_permuted_epoch(train_set.is_shuffled)),
        accelerator=accelerator,
        record=record,
        console=console,
        model=model,
        loss_model=fit.loss_model,
        optimizer=optimizer,
        peak=peak,
    )


def build_model_and_optimizer(
    config: TrainingConfig, inputs: Inputs, start: Start, accelerator: Accelerator
) -> tuple[GPT2ReproForCausalLM, StepMemory, torch.optim.Optimizer]:
    """Build the model with its initial weights on its device, and an optimizer without state.

    Returns:
        `(model, memory, optimizer)`; `memory` estimates a step's memory on a GPU.

    Raises:
        UserError: the model cannot be loaded, or does not fit the settings, the prompt, the HellaSwag items or the
            device.
    """
    model = build_model(str(start.checkpoint or config.init_from), config, inputs.tokenizer)
    memory = describe_step_memory(config, model, accelerator.mixed_precision)
    model = place_on_device(model, memory, accelerator).train()
    # A prompt or an ending that is too long should fail now, not at the first sample or score.
    if config.sample_every:
        encode_prompt(model, inputs.tokenizer, config.sample_prompt, config.sample_tokens)
    if inputs.hellaswag:
        inputs.hellaswag.check_fits(get_max_positions(model))
    model.loss_chunk_tokens = config.loss_chunk_tokens
    if config.gradient_checkpointing:
        # transformers 5.23 deprecates the only name that 5.17 has.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable()
    optimizer = build_adamw(model, config.learning_rate, config.weight_decay, (config.beta1, config.beta2))
    return model, memory, optimizer


def describe_run(plan: Plan, inputs: Inputs, start: Start, accelerator: Accelerator, peak: Peak) -> Iterator[str]:
    """Yield lines that describe device, model and data."""
    config, train_set = plan.config, not_none(inputs.train_set)
    order = "shuffled" if train_set.is_shuffled else "in source order"
    source = start.checkpoint or config.init_from
    yield f"device      {describe_device(accelerator, config.mixed_precision)}"
    yield f"peak        {peak.flops / 1e12:,.2f} TFLOP/s per process, {peak.source}"
    yield f"model       {plan.n_parameters:,} parameters, from {source}, dropout {config.dropout:g}"
    yield f"data        {config.data_dir}: {train_set.n_tokens:,} training tokens, {order}"
    if inputs.eval_bytes and not inputs.eval_bytes.is_exact:
        yield NOTE


def describe_work(plan: Plan, start: Start, seconds: float) -> Iterator[str]:
    """Yield lines that describe the work left, given its estimated duration."""
    yield plan.describe_step()
    yield plan.describe_length()
    yield f"time        about {format_duration(seconds)} from step {start.step:,}, evaluations included"
    for skip in start.skips:
        yield f"skipped     updates {skip.start:,} to {skip.stop - 1:,}"
