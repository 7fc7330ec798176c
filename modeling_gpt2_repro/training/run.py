"""A run, built in steps: model and optimizer, plan, device, record. `train.py` has the loop that works with it."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from accelerate import Accelerator

from ..core.devices import describe_device, name_hardware, reset_peak_memory
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
    """What the loop works with.

    Attributes:
        order: which windows each update consumes.
        model: the plain module, which is evaluated, sampled and saved.
        loss_model: wraps it, compiled and distributed.
        n_overflows: updates in a row, up to the last, that had an infinite gradient.
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
        """Return whether the model after `step` updates is to be evaluated.

        The model that a run resumes from was, before it was saved, as a rule; a trial skips its first evaluation.
        """
        skips_first = self.start.state.is_evaluated if self.start.state else self.config.smoke
        return self.plan.is_eval_step(step) and not (step == self.plan.first_step and skips_first)

    def is_save_due(self, step: int, stop: bool) -> bool:
        """Return whether the model after `step` updates is to be saved; a trial that is stopped leaves nothing."""
        if step == self.plan.first_step or (stop and self.config.smoke):
            return False
        return stop or self.plan.is_due(self.config.save_every, step)

    def is_skipped(self, step: int) -> bool:
        """Return whether the update after `step` others is passed over."""
        return any(step + 1 in skip for skip in self.start.skips)

    def describe_state(self, step: int, is_evaluated: bool) -> TrainingState:
        """Describe where the run stands after `step` updates, for a checkpoint."""
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
        """Describe how the run is resumed if it ends now."""
        requested, folder = self.config.resume_from_checkpoint, self.record.folder.checkpoints
        if not list_checkpoints(folder):
            return "it has no checkpoint yet, and the same command starts it again"
        goes_back = requested == "never" or (requested != "auto" and is_own_checkpoint(requested, folder))
        command = "the same command with --resume_from_checkpoint auto" if goes_back else "the same command"
        return f"{command} resumes from its last checkpoint"


def build_run(
    config: TrainingConfig, inputs: Inputs, start: Start, accelerator: Accelerator, record: RunRecord, console: Console
) -> Run:
    """Build everything that the loop needs, and describe what it will do.

    Checks for late failures, such as a full disk, run here, before the first step; the record is opened last.

    Raises:
        UserError: a check failed: model, batch, memory, disk or duration.
    """
    model, memory, optimizer = build_model_and_optimizer(config, inputs, start, accelerator)
    plan = build_plan(config, inputs, start, model, accelerator)
    if accelerator.is_main_process:
        folder = record.folder.checkpoints  # may lie on another disk, and has by far the most of the run
        check_disk(folder, plan.estimate_disk_bytes() - measure_folder(folder))
    peak = choose_peak(accelerator.device, accelerator.mixed_precision, config.tf32)
    console.say(f"run         {record.folder}, tracked by {' and '.join(record.trackers) or 'none'}")
    console.say(*describe_run(plan, inputs, start, accelerator, peak))
    fit, optimizer = fit_to_device(plan, memory, start, inputs.train_set, model, optimizer, accelerator, console.say)
    plan = replace(plan, micro_batch_size=fit.micro_batch_size)
    seconds = plan.estimate_seconds(accelerator.num_processes / fit.seconds_per_token)
    check_duration(seconds, accelerator.device.type, is_accepted=config.yes or config.smoke)
    console.say(*describe_work(plan, start, seconds))
    # With all the skips, those of the checkpoint too. A tracker knows a run that forks off another as one of its own.
    recorded = replace(config, skip_steps=[f"{skip.start}:{skip.stop - 1}" for skip in start.skips])
    record.start(recorded, start.resumed_step, start.state.tracker_run_id if start.is_own else None)
    reset_peak_memory(accelerator.device)
    return Run(
        config=config,
        inputs=inputs,
        start=start,
        plan=plan,
        schedule=config.build_schedule(start.max_steps),
        order=WindowOrder(plan.n_windows, config.seed, config.first_permuted_epoch(inputs.train_set.is_shuffled)),
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
    """Build the model, with the weights to start from, on its device, and its optimizer without any state.

    Returns:
        `(model, memory, optimizer)`; `memory` estimates what a step takes of a GPU.

    Raises:
        UserError: there is no such model, or it does not fit the settings, the samples, the items or the device.
    """
    model = build_model(str(start.checkpoint or config.init_from), config, inputs.tokenizer)
    memory = describe_step_memory(config, model, accelerator.mixed_precision)
    model = place_on_device(model, memory, accelerator).train()
    # A prompt or an ending that does not fit should fail now, and not at the first sample or the last score.
    if config.sample_every:
        encode_prompt(model, inputs.tokenizer, config.sample_prompt, config.sample_tokens)
    if inputs.hellaswag:
        inputs.hellaswag.check_fits(get_max_positions(model))
    model.loss_chunk_tokens = config.loss_chunk_tokens
    if config.gradient_checkpointing:
        # transformers 5.23 deprecates the name that older releases, such as 5.17, have alone.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable()
    optimizer = build_adamw(model, config.learning_rate, config.weight_decay, (config.beta1, config.beta2))
    return model, memory, optimizer


def describe_run(plan: Plan, inputs: Inputs, start: Start, accelerator: Accelerator, peak: Peak) -> Iterator[str]:
    """Describe what is trained, on what and with what."""
    config, order = plan.config, "shuffled" if inputs.train_set.is_shuffled else "in source order"
    source = start.checkpoint or config.init_from
    yield f"device      {describe_device(accelerator, config.mixed_precision)}"
    yield f"peak        {peak.flops / 1e12:,.2f} TFLOP/s a process, {peak.source}"
    yield f"model       {plan.n_parameters:,} parameters, from {source}, dropout {config.dropout:g}"
    yield f"data        {config.data_dir}: {inputs.train_set.n_tokens:,} training tokens, {order}"
    if inputs.eval_bytes and not inputs.eval_bytes.is_exact:
        yield NOTE


def describe_work(plan: Plan, start: Start, seconds: float) -> Iterator[str]:
    """Describe how much is left to do, given how long it will take."""
    yield plan.describe_step()
    yield plan.describe_length()
    yield f"time        about {format_duration(seconds)} from step {start.step:,}, evaluations included"
    for skip in start.skips:
        yield f"skipped     updates {skip.start:,} to {skip.stop - 1:,}"
