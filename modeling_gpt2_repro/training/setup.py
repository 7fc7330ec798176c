"""A training run, put together: all that the loop in `train.py` works with, built and checked before step 1."""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import PreTrainedTokenizerBase

from modeling_gpt2_repro.core.devices import (
    ACCELERATOR_MICRO_BATCH_SIZE,
    compute_once,
    describe_device,
    get_largest_micro_batch_size,
    name_hardware,
    reset_peak_memory,
)
from modeling_gpt2_repro.core.errors import UserError
from modeling_gpt2_repro.data.dataset import TokenDataset, load_data_tokenizer
from modeling_gpt2_repro.data.shards import fingerprint_split, load_manifest
from modeling_gpt2_repro.data.text_bytes import NOTE, TextBytes, count_text_bytes
from modeling_gpt2_repro.data.tokenizer import fingerprint_tokenizer
from modeling_gpt2_repro.evaluation.hellaswag import HellaSwagQuestions
from modeling_gpt2_repro.evaluation.hellaswag_data import load_hellaswag
from modeling_gpt2_repro.evaluation.samples import encode_prompt
from modeling_gpt2_repro.model.building import build_model, build_skeleton, load_shape, resolve_shape
from modeling_gpt2_repro.model.loading import get_max_positions
from modeling_gpt2_repro.modeling_gpt2_repro import GPT2ReproForCausalLM
from modeling_gpt2_repro.training import checkpoint as checkpoints
from modeling_gpt2_repro.training.batch_fit import settle_gradient_exchange
from modeling_gpt2_repro.training.config import SMOKE_STEPS, TrainingConfig
from modeling_gpt2_repro.training.console import Console, format_duration
from modeling_gpt2_repro.training.device_fit import fit_to_device, place_on_device
from modeling_gpt2_repro.training.faults import explained_out_of_memory
from modeling_gpt2_repro.training.optim import build_adamw
from modeling_gpt2_repro.training.plan import (
    HELLASWAG_ITEMS,
    TOKENS_PER_HELLASWAG_ITEM,
    Plan,
    count_flops_per_token,
)
from modeling_gpt2_repro.training.preflight import (
    check_disk,
    check_duration,
    measure_folder,
)
from modeling_gpt2_repro.training.record import RunRecord
from modeling_gpt2_repro.training.run_folder import has_content
from modeling_gpt2_repro.training.schedule import is_same_so_far
from modeling_gpt2_repro.training.skipping import check_any_made, merge_skips
from modeling_gpt2_repro.training.throughput import Clock, Peak, choose_peak
from modeling_gpt2_repro.training.trackers import choose_trackers

GPT2_VOCAB_SIZE = 50257


@dataclass
class Inputs:
    """What a run reads; what is never evaluated is `None`."""

    tokenizer: PreTrainedTokenizerBase
    train_set: TokenDataset
    val_set: TokenDataset | None
    eval_bytes: TextBytes | None
    hellaswag: HellaSwagQuestions | None

    def count_eval_tokens(self, config: TrainingConfig) -> int:
        """Return the tokens of one validation."""
        return min(config.eval_tokens, self.val_set.n_tokens) if self.val_set else 0


class Publisher(Protocol):
    """Uploads what a run writes, beside the training (see `reporting.publisher`)."""

    def check(self, is_resumed: bool) -> None:
        """Raise a `UserError` where the run could not publish."""

    def start(self, first_step: int | None) -> None:
        """Begin; `None` for a run that begins anew."""

    def submit(self, checkpoint: Path) -> None:
        """Take a checkpoint to be uploaded."""

    def finish(self) -> None:
        """Upload the finished model."""


@dataclass
class Run:
    """What the loop works with. `model` is the plain module; `loss_model` wraps it, compiled and distributed.

    Attributes:
        experiment: what a resumed run may not change.
        skips: updates that are passed over.
        is_first_step_evaluated: nothing is to be measured before the first update.
        micro_batch_sizes: the sizes that divide a step, largest first.
        n_overflows: updates in a row, up to the last, that had an infinite gradient.
    """

    config: TrainingConfig
    plan: Plan
    accelerator: Accelerator
    record: RunRecord
    console: Console
    inputs: Inputs
    model: GPT2ReproForCausalLM
    loss_model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    experiment: dict
    skips: list[range]
    is_first_step_evaluated: bool
    micro_batch_sizes: list[int]
    peak: Peak
    publisher: Publisher
    clock: Clock = field(default_factory=Clock)
    n_overflows: int = 0

    def describe_state(self, step: int, is_evaluated: bool) -> checkpoints.TrainingState:
        """Describe where the run stands after `step` updates, for a checkpoint."""
        return checkpoints.TrainingState(
            step=step,
            tokens=step * self.config.tokens_per_step,
            experiment=self.experiment,
            skips=self.skips,
            tracker_run_id=self.record.tracker_run_id,
            is_evaluated=is_evaluated,
            micro_batch_size=self.plan.micro_batch_size,
            hardware=name_hardware(self.accelerator),
        )

    def resume_hint(self) -> str:
        """Say how the run goes on if it ends now."""
        return checkpoints.resume_hint(self.config.resume_from_checkpoint, self.record.folder.checkpoints)


def load_inputs(config: TrainingConfig, accelerator: Accelerator) -> Inputs:
    """Open the shards and load what the run is evaluated on.

    Raises:
        UserError: any of it is missing, damaged, or does not belong together.
    """
    tokenizer = load_data_tokenizer(config.data_dir)
    train_set, val_set = (
        TokenDataset(config.data_dir, split, config.sequence_length, len(tokenizer)) if wanted else None
        for split, wanted in (("train", True), ("val", config.eval_every))
    )
    n_windows = config.eval_tokens // config.sequence_length
    eval_bytes = count_text_bytes(val_set, n_windows, tokenizer) if val_set else None
    hellaswag = None
    if config.hellaswag_every:
        with accelerator.main_process_first():
            items = load_hellaswag(config.hellaswag_file, config.hellaswag_limit)
        hellaswag = HellaSwagQuestions(items, tokenizer, accelerator)
    return Inputs(tokenizer, train_set, val_set, eval_bytes, hellaswag)


def build_run(config: TrainingConfig, accelerator: Accelerator, record: RunRecord, publisher: Publisher) -> Run | None:
    """Build everything that the loop needs and say what it will do; `None` where the run is finished already.

    What would fail at the end of the night is checked on the way; the run folder is touched last.

    Raises:
        UserError: something that the run could not end well with.
    """
    console = Console(enabled=accelerator.is_main_process)
    trackers = choose_trackers(config.report_to)
    inputs = load_inputs(config, accelerator)
    max_steps = config.derive_max_steps(len(inputs.train_set))
    experiment = {
        **config.experiment,
        **resolve_shape(config),
        "max_steps": max_steps,
        "train_tokens": inputs.train_set.n_tokens,
        "data": fingerprint_split(config.data_dir, "train"),
        "tokenizer": fingerprint_tokenizer(inputs.tokenizer),
    }
    resume_from = broadcast_resume_checkpoint(config, accelerator, record, console)
    state = load_resumed_state(resume_from, config, experiment) if resume_from else None
    first_step = state.step if state else 0
    check_agreement(accelerator, [first_step, max_steps, experiment["data"]])
    skips = merge_skips(state.skips if state else [], config.skips, first_step)
    check_any_made(skips, first_step, max_steps)
    is_own = resume_from is not None and checkpoints.is_own_checkpoint(resume_from, record.folder.checkpoints)
    if not is_own:
        record.folder.check_replaceable()
    is_finished = has_content(record.folder.final)
    if resume_from and first_step >= max_steps and record.folder.get_finished_step() >= max_steps:
        console.say(f"{record.folder} is finished: it has {first_step:,} of {max_steps:,} steps")
        if accelerator.is_main_process:
            record.folder.clear_leftovers(config)
        publisher.finish()
        return None
    if is_finished and not is_own and config.resume_from_checkpoint != "never":
        raise UserError(
            f"{record.folder} holds a finished run: give another --run_name, or --resume_from_checkpoint never to "
            "replace it"
        )
    publisher.check(is_resumed=state is not None)

    source = str(resume_from) if resume_from else config.init_from
    model = place_on_device(config, accelerator, build_model(source, config, inputs.tokenizer)).train()
    if config.sample_every:  # to hear of a prompt that does not fit now, and not at the first sample
        encode_prompt(model, inputs.tokenizer, config.sample_prompt, config.sample_tokens)
    if inputs.hellaswag:  # nor of an ending at the last score
        inputs.hellaswag.check_fits(get_max_positions(model))
    model.loss_chunk_tokens = config.loss_chunk_tokens
    if config.gradient_checkpointing:
        # transformers 5.23 deprecates the name that older releases, such as 5.17, have alone.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable()
    optimizer = build_adamw(model, config.learning_rate, config.weight_decay, (config.beta1, config.beta2))
    largest = get_largest_micro_batch_size(accelerator.device, config.sequence_length)
    sizes = config.list_micro_batch_sizes(accelerator.num_processes, largest)
    plan = Plan(
        n_processes=accelerator.num_processes,
        micro_batch_size=sizes[0],
        first_step=first_step,
        max_steps=max_steps,
        last_step=min(max_steps, SMOKE_STEPS) if config.smoke else max_steps,
        n_windows=len(inputs.train_set),
        n_parameters=model.num_parameters(),
        flops_per_token=count_flops_per_token(model, config.sequence_length),
        eval_tokens=inputs.count_eval_tokens(config),
        hellaswag_tokens=inputs.hellaswag.encode("original").n_tokens if inputs.hellaswag else 0,
    )
    if accelerator.is_main_process:
        folder = record.folder.checkpoints  # may lie on another disk, and has by far the most of it
        check_disk(folder, plan.estimate_disk_bytes(config) - measure_folder(folder))
    peak = choose_peak(accelerator.device, accelerator.mixed_precision, config.tf32)
    order = "shuffled" if inputs.train_set.is_shuffled else "in source order"
    console.say(f"run         {record.folder}, tracked by {' and '.join(trackers) or 'none'}")
    console.say(f"device      {describe_device(accelerator, config.mixed_precision)}")
    console.say(f"peak        {peak.flops / 1e12:,.2f} TFLOP/s a process, {peak.source}")
    console.say(f"model       {plan.n_parameters:,} parameters, from {source}, dropout {config.dropout:g}")
    console.say(f"data        {config.data_dir}: {inputs.train_set.n_tokens:,} training tokens, {order}")
    if inputs.eval_bytes and not inputs.eval_bytes.is_exact:
        console.say(NOTE)

    fit = fit_to_device(config, accelerator, model, inputs.train_set, sizes, state, console.say)
    # Not before the trial, which keeps room for what this brings.
    if resume_from:
        checkpoints.load_optimizer_state(resume_from, optimizer, accelerator.scaler)
    loss_model, optimizer = accelerator.prepare(fit.loss_model, optimizer)
    with explained_out_of_memory(sizes, fit.micro_batch_size):
        settle_gradient_exchange(loss_model, inputs.train_set, fit.micro_batch_size, accelerator)
    plan = replace(plan, micro_batch_size=fit.micro_batch_size)
    seconds = plan.estimate_seconds(config, accelerator.num_processes / fit.seconds_per_token)
    check_duration(seconds, accelerator.device.type, is_accepted=config.yes or config.smoke)
    console.say(plan.describe_step(config))
    console.say(plan.describe_length(config))
    console.say(f"time        about {format_duration(seconds)} from step {first_step:,}, evaluations included")
    for skip in skips:
        console.say(f"skipped     updates {skip.start:,} to {skip.stop - 1:,}")
    recorded = replace(config, skip_steps=[f"{skip.start}:{skip.stop - 1}" for skip in skips])
    # A tracker knows a run that forks off another as one of its own.
    record.start(recorded, first_step if state else None, state.tracker_run_id if is_own else None)
    if is_own:  # the run may have been killed between this checkpoint and its way to the Hub
        publisher.submit(resume_from)
    publisher.start(first_step if state else None)
    reset_peak_memory(accelerator.device)
    return Run(
        config=config,
        plan=plan,
        accelerator=accelerator,
        record=record,
        console=console,
        inputs=inputs,
        model=model,
        loss_model=loss_model,
        optimizer=optimizer,
        experiment=experiment,
        skips=skips,
        is_first_step_evaluated=state.is_evaluated if state else config.smoke,
        micro_batch_sizes=config.list_divisors(accelerator.num_processes),
        peak=peak,
        publisher=publisher,
    )


def broadcast_resume_checkpoint(
    config: TrainingConfig, accelerator: Accelerator, record: RunRecord, console: Console
) -> Path | None:
    """Choose the checkpoint to go on from in the first process, which reads all of it, and tell the others.

    Raises:
        UserError: as `choose_checkpoint`, or for links in the run folder, in every process.
    """

    def choose() -> Path | None:
        record.folder.check_links(is_resumed=config.resume_from_checkpoint != "never")
        record.claim()
        return checkpoints.choose_checkpoint(config.resume_from_checkpoint, record.folder.checkpoints, console.say)

    return compute_once(choose, accelerator)


def check_agreement(accelerator: Accelerator, facts: list[Any]) -> None:
    """Raise a `UserError` where the processes, on several machines, are about to train different things."""
    for process, other in enumerate(gather_object([facts])):
        if other != facts:
            raise UserError(
                f"process {process} starts at step {other[0]} of {other[1]}, this one at step {facts[0]} of {facts[1]}"
                ", or their data differ: --data_dir has to hold the same shards, and --output_dir to be the same "
                "folder, on all machines"
            )


def load_resumed_state(
    checkpoint: Path, config: TrainingConfig, experiment: dict[str, Any]
) -> checkpoints.TrainingState:
    """Read where a run stood, and check that it would go on as the same experiment.

    Its length may be another one where that changes none of the updates it has made: with the `constant` schedule
    always, with `wsd` before its decay.

    Raises:
        UserError: anything else differs that decides the weights.
    """
    state = checkpoints.load_state(checkpoint)
    # A checkpoint that does not say where its first weights came from is older than the question.
    saved = {"init_from": config.init_from, **state.experiment, **load_shape(str(checkpoint))}
    max_steps, saved_max_steps = experiment["max_steps"], saved.get("max_steps")
    is_prolonged = isinstance(saved_max_steps, int) and max_steps != saved_max_steps
    if (
        is_prolonged
        and state.step <= max_steps
        and is_same_so_far(
            state.step,
            max_steps,
            saved_max_steps,
            warmup_steps=config.warmup_steps,
            peak=config.learning_rate,
            min_ratio=config.min_lr_ratio,
            schedule=config.lr_schedule,
        )
    ):
        saved = saved | {"max_steps": max_steps}
    checkpoints.check_experiment(checkpoint, saved, experiment)
    return state


def describe_plan(config: TrainingConfig) -> list[str]:
    """Return the arithmetic of a run in lines, from its settings and, where they are prepared, its data.

    Nothing is computed and no device is needed: the micro-batch is the one that a GPU's trial begins with.

    Raises:
        UserError: settings that do not work, or no data and no `max_steps`.
    """
    has_data = Path(config.data_dir).is_dir()
    n_windows, eval_tokens, vocab_size = None, config.eval_tokens, GPT2_VOCAB_SIZE
    if has_data or config.max_steps is None:
        manifest = load_manifest(config.data_dir)
        vocab_size = manifest.vocab_size if manifest is not None else GPT2_VOCAB_SIZE
        n_windows = len(TokenDataset(config.data_dir, "train", config.sequence_length, vocab_size))
        if config.eval_every:
            val_set = TokenDataset(config.data_dir, "val", config.sequence_length, vocab_size)
            eval_tokens = min(eval_tokens, val_set.n_tokens)
    n_items = min(config.hellaswag_limit or HELLASWAG_ITEMS, HELLASWAG_ITEMS)
    if config.hellaswag_every and config.hellaswag_file is not None:
        n_items = len(load_hellaswag(config.hellaswag_file, config.hellaswag_limit))
    n_processes = int(os.environ.get("WORLD_SIZE", "1"))
    model = build_skeleton(config, vocab_size)
    plan = Plan(
        n_processes=n_processes,
        micro_batch_size=config.list_micro_batch_sizes(n_processes, ACCELERATOR_MICRO_BATCH_SIZE)[0],
        first_step=0,
        max_steps=config.derive_max_steps(n_windows or 0),
        last_step=config.derive_max_steps(n_windows or 0),
        n_windows=n_windows,
        n_parameters=model.num_parameters(),
        flops_per_token=count_flops_per_token(model, config.sequence_length),
        eval_tokens=eval_tokens,
        hellaswag_tokens=TOKENS_PER_HELLASWAG_ITEM * n_items,
    )
    return plan.describe_costs(config)
