"""Train GPT-2 from token shards.

One device: `python train.py`; several: `accelerate launch --config_file accelerate_config.yaml train.py`. The defaults
reproduce GPT-2 124M, and any number of devices runs the same experiment.
"""

import contextlib
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import modeling_gpt2_repro  # noqa: F401  before the libraries, to explain what they do not take

# isort: split
import torch
from transformers.utils import logging as transformers_logging

from modeling_gpt2_repro.core.arguments import parse_arguments
from modeling_gpt2_repro.core.devices import measure_peak_memory, prepare_cpu_process, start_accelerator
from modeling_gpt2_repro.core.errors import UserError, reports_user_errors
from modeling_gpt2_repro.core.files import create_folder_atomically, write_json
from modeling_gpt2_repro.core.streams import discard_unwritten
from modeling_gpt2_repro.data.dataset import prefetch
from modeling_gpt2_repro.data.order import WindowOrder
from modeling_gpt2_repro.evaluation.eval_only import evaluate_only
from modeling_gpt2_repro.evaluation.hellaswag import evaluate_hellaswag
from modeling_gpt2_repro.evaluation.samples import generate_samples
from modeling_gpt2_repro.evaluation.validation import evaluate_loss
from modeling_gpt2_repro.model.folder import save_model, save_published_model
from modeling_gpt2_repro.plots.drawer import CurveDrawer
from modeling_gpt2_repro.publishing.model_card import write_model_card
from modeling_gpt2_repro.publishing.uploader import Uploader
from modeling_gpt2_repro.training import checkpoint as checkpoints
from modeling_gpt2_repro.training import faults
from modeling_gpt2_repro.training.config import FOREIGN_FLAGS, TrainingConfig
from modeling_gpt2_repro.training.console import Console
from modeling_gpt2_repro.training.optim import set_learning_rate
from modeling_gpt2_repro.training.preemption import INTERRUPTED_EXIT_CODE, PREEMPTED_EXIT_CODE, Preemption
from modeling_gpt2_repro.training.preflight import check_disk, estimate_disk_bytes
from modeling_gpt2_repro.training.record import RunRecord
from modeling_gpt2_repro.training.run_folder import RunFolder
from modeling_gpt2_repro.training.schedule import compute_learning_rate
from modeling_gpt2_repro.training.setup import Run, build_run, describe_plan
from modeling_gpt2_repro.training.skipping import is_skipped
from modeling_gpt2_repro.training.smoke import describe_smoke_test


@reports_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Train GPT-2 from the token shards that prepare_data.py writes."""
    config = parse_arguments(TrainingConfig, argv, description=main.__doc__, foreign_flags=FOREIGN_FLAGS)
    transformers_logging.disable_progress_bar()
    if config.plan:
        if os.environ.get("RANK", "0") == "0":
            print("\n".join(describe_plan(config)))
        return 0
    with Preemption() as preemption:
        return start(config.as_smoke_test() if config.smoke else config, preemption)


def start(config: TrainingConfig, preemption: Preemption) -> int:
    """Build the run and let it go on to its end, with the outcome in `status.json`; return the exit code."""
    prepare_cpu_process()
    accelerator = start_accelerator(config.mixed_precision, tf32=config.tf32, deterministic=config.deterministic)
    console = Console(accelerator.is_main_process)
    record = RunRecord(RunFolder(Path(config.output_dir) / config.run_name), accelerator, console.say)
    publisher = Uploader(record.folder, config, config.push_to_hub and accelerator.is_main_process, console.say)
    try:
        with faults.explained_nondeterminism():
            if config.eval_only:
                evaluate_only(config, accelerator)
            elif run := build_run(config, accelerator, record, publisher):
                return run_to_the_end(run, preemption)
    except BaseException as error:
        record.set_failed(error)
        raise
    finally:
        record.close()
        discard_unwritten()  # a run needs nobody who reads what it prints
        if config.smoke and record.is_open:
            shutil.rmtree(record.folder.path, ignore_errors=True)
    return 0


def run_to_the_end(run: Run, preemption: Preemption) -> int:
    """Train and publish, or stop early with a checkpoint where that is asked for; return the exit code."""
    with (
        faults.explained_out_of_memory(run.micro_batch_sizes, run.plan.micro_batch_size),
        faults.explained_write_failures(run.record.folder, run.resume_hint),
        preemption.deferred(),
    ):
        with CurveDrawer(run.record.folder, run.console.say, enabled=run.accelerator.is_main_process) as curves:
            step = train(run, preemption, curves)
        if step < run.plan.last_step and run.config.smoke:
            run.console.say(f"the trial was stopped after {step:,} steps, and leaves nothing to go on from")
            return INTERRUPTED_EXIT_CODE
        if step < run.plan.last_step:
            run.record.set_status("preempted", step=step)
            run.console.say(f"stopped after {step:,} steps, as asked: {run.resume_hint()}")
            return PREEMPTED_EXIT_CODE
        finish_smoke_test(run) if run.config.smoke else publish(run)
    return 0


def train(run: Run, preemption: Preemption, curves: CurveDrawer) -> int:
    """The loop: evaluate and save the model after `step` updates, and make the next update; return the last step."""
    config, plan = run.config, run.plan
    order = WindowOrder(plan.n_windows, config.seed, config.first_permuted_epoch(run.inputs.train_set.is_shuffled))
    made = (step for step in range(plan.first_step, plan.last_step) if not is_skipped(step + 1, run.skips))
    micro_batches = order.divide_steps(
        made, config.windows_per_step, plan.n_processes, run.accelerator.process_index, plan.micro_batch_size
    )
    batches = prefetch(run.inputs.train_set, micro_batches, run.accelerator.device)
    run.console.start(plan.first_step, plan.max_steps)
    for step in range(plan.first_step, plan.last_step + 1):
        is_asked_to_stop = step < plan.last_step and preemption.is_requested(run.accelerator)
        if is_asked_to_stop and config.smoke:
            break
        is_evaluated = not plan.is_eval_step(config, step) or (step == plan.first_step and run.is_first_step_evaluated)
        # Who asks to stop waits for seconds, and an evaluation can take minutes: the resumed run will make it.
        if not is_evaluated and not is_asked_to_stop:
            with run.clock.measure("evaluation"):
                evaluate(run, step)
            curves.request()
            is_evaluated = True
        if step > plan.first_step and (is_asked_to_stop or plan.is_due(config.save_every, step)):
            with run.clock.measure("checkpoint"):
                is_saved = save(run, step, is_evaluated)
            if is_asked_to_stop and not is_saved:
                raise UserError(f"asked to stop, the run could not save: {run.resume_hint()}")
        if is_asked_to_stop:
            break
        if step < plan.last_step and not is_skipped(step + 1, run.skips):
            update(run, step, batches, order)
    run.console.close()
    return step


def update(run: Run, step: int, batches: Iterator[torch.Tensor], order: WindowOrder) -> None:
    """Make update `step + 1`: forward and backward over its micro-batches, clip, and let the optimizer step."""
    config, plan, accelerator, optimizer = run.config, run.plan, run.accelerator, run.optimizer
    # Dropout's masks follow from the step, so that a resumed run draws the same.
    torch.manual_seed(config.seed + step * plan.n_processes + accelerator.process_index)
    started, waited = time.perf_counter(), 0.0
    learning_rate = compute_learning_rate(
        step,
        max_steps=plan.max_steps,
        warmup_steps=config.warmup_steps,
        peak=config.learning_rate,
        min_ratio=config.min_lr_ratio,
        schedule=config.lr_schedule,
    )
    set_learning_rate(optimizer, learning_rate)
    n_micro_steps = plan.count_micro_steps(config)
    loss = torch.zeros((), device=accelerator.device)
    for micro_step in range(n_micro_steps):
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked
        is_last_micro_step = micro_step == n_micro_steps - 1
        with contextlib.nullcontext() if is_last_micro_step else accelerator.no_sync(run.loss_model):
            micro_loss = run.loss_model(batch) / n_micro_steps
            accelerator.backward(micro_loss)
        loss += micro_loss.detach()
    grad_norm = accelerator.clip_grad_norm_(run.model.parameters(), config.grad_clip)
    loss, grad_norm = torch.stack([accelerator.reduce(loss, reduction="mean"), grad_norm]).tolist()
    # An infinite gradient is fp16's scaler's to deal with: it skips the update and scales less, until that is no help.
    if not math.isfinite(loss) or (not math.isfinite(grad_norm) and accelerator.scaler is None):
        raise faults.NonFiniteError(step + 1, loss, grad_norm, order.windows_of_step(step, config.windows_per_step))
    run.n_overflows = 0 if math.isfinite(grad_norm) else run.n_overflows + 1
    if run.n_overflows >= faults.MOST_OVERFLOWS:
        raise faults.RepeatedOverflowError(step + 1, run.n_overflows)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)

    seconds = time.perf_counter() - started
    run.clock.seconds["update"].append(seconds)
    tokens_per_second = config.tokens_per_step / seconds
    metrics = {
        "train/loss": loss,
        "train/lr": learning_rate,
        "train/grad_norm": grad_norm,
        "train/tokens_per_second": tokens_per_second,
        "train/mfu": tokens_per_second * plan.flops_per_token / (plan.n_processes * run.peak.flops),
        "train/data_wait_seconds": waited,
        **plan.count_progress(step + 1, config),
        "train/elapsed_seconds": time.monotonic() - run.record.started,
        "train/peak_memory_gb": measure_peak_memory(accelerator.device),
    }
    run.record.log(step + 1, metrics)
    run.console.show_step(step + 1, metrics)


def evaluate(run: Run, step: int) -> None:
    """Validate, score HellaSwag and sample the model after `step` updates, each where it is due."""
    config, plan, accelerator, inputs = run.config, run.plan, run.accelerator, run.inputs
    metrics = {}
    if plan.is_due(config.eval_every, step):
        validation = evaluate_loss(
            run.model,
            inputs.val_set,
            config.eval_tokens // config.sequence_length,
            batch_size=plan.micro_batch_size,
            n_bytes=inputs.eval_bytes.count,
            accelerator=accelerator,
        )
        metrics |= {"val/loss": validation.loss, "val/bpb": validation.bpb}
        if config.save_best and validation.loss < run.record.best_val_loss and accelerator.is_main_process:
            with (
                faults.tolerated_write_failures("the best model was not written", run.console.say),
                create_folder_atomically(run.record.folder.best) as folder,
            ):
                save_model(folder, run.model, inputs.tokenizer)
                write_json(folder / run.record.folder.best_metrics.name, {"step": step, **metrics})
            run.record.read_best(step)  # where only the last of it failed, it is there
    if plan.is_due(config.hellaswag_every, step):
        # Papers cite the other protocol: its score belongs to the finished model.
        for protocol in ("original", "lm_eval") if step == plan.last_step else ("original",):
            encoded = inputs.hellaswag.encode(protocol)
            with accelerator.autocast():
                result = evaluate_hellaswag(run.model, encoded, accelerator=accelerator, show_progress=False)
            metrics |= result.metrics()
    if metrics:
        run.record.log(step, metrics)
        shown = {name: value for name, value in metrics.items() if not name.endswith(("_stderr", "/n"))}
        run.console.say(f"step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in shown.items()))
    if plan.is_due(config.sample_every, step) and accelerator.is_main_process:
        texts = generate_samples(
            run.model, inputs.tokenizer, config.sample_prompt, n_tokens=config.sample_tokens, seed=config.seed + step
        )
        run.record.log_samples(step, texts)
        run.console.say(f"step {step} sample: {texts[0]!r}")


def save(run: Run, step: int, is_evaluated: bool) -> bool:
    """Write a checkpoint of the model after `step` updates; where the disk has no room, training goes on without.

    Returns:
        Whether it was written, as far as this process knows.
    """
    is_saved = not run.accelerator.is_main_process
    started, config, folder = time.perf_counter(), run.config, run.record.folder.checkpoints
    run.record.check_claim()
    if run.accelerator.is_main_process:
        with faults.tolerated_write_failures(f"the checkpoint of step {step} was not written", run.console.say):
            run.record.folder.sync()
            check_disk(folder, estimate_disk_bytes(run.plan.n_parameters, n_saves=1, keep_checkpoints=1))
            checkpoint = checkpoints.save_checkpoint(
                folder,
                run.describe_state(step, is_evaluated),
                run.model,
                run.inputs.tokenizer,
                run.optimizer,
                run.accelerator.scaler,
            )
            is_saved = True
            run.publisher.submit(checkpoint)
        with faults.tolerated_write_failures("an old checkpoint was not deleted", run.console.say):
            checkpoints.prune_checkpoints(folder, config.keep_checkpoints, config.keep_weights_every)
        run.record.log(step, {"train/checkpoint_seconds": time.perf_counter() - started})
    run.accelerator.wait_for_everyone()
    return is_saved


def publish(run: Run) -> None:
    """Write `final/`: the model as GPT-2, with its tokenizer and a card that says how it came to be."""
    run.record.check_claim()
    if run.accelerator.is_main_process:
        with create_folder_atomically(run.record.folder.final) as folder:
            save_published_model(folder, run.model, run.inputs.tokenizer)
            write_model_card(folder, run.record.folder)
        run.record.finish(run.plan.max_steps)
        run.console.say(f"finished: {run.record.folder.final} holds the model, and curves.png beside it the curves")
    run.accelerator.wait_for_everyone()
    run.publisher.finish()  # with the other processes free to go


def finish_smoke_test(run: Run) -> None:
    """Load the trial's checkpoint again and say what was measured."""
    if run.accelerator.is_main_process:
        saved = checkpoints.list_checkpoints(run.record.folder.checkpoints)
        if not saved:
            raise UserError("the trial could not write a checkpoint, nor could the run: see what it said above")
        checkpoints.check_reload(saved[-1], run.model, run.optimizer)
        peak_memory = measure_peak_memory(run.accelerator.device)
        for line in describe_smoke_test(run.config, run.plan, run.clock, run.peak, peak_memory):
            run.console.say(line)
    run.accelerator.wait_for_everyone()


if __name__ == "__main__":
    sys.exit(main())
