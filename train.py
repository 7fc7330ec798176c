"""Train GPT-2 from token shards.

One device: `python train.py`; several: `accelerate launch --config_file accelerate_config.yaml train.py`. The defaults
reproduce GPT-2 124M; the number of devices does not change the experiment (unless dropout is enabled).

A `step` is a number of completed updates, in the loop, in checkpoint names and in `metrics.jsonl`. At `step`, the loop
makes update `step + 1`. `Schedule` and `WindowOrder` count updates from 0, so they are called with `step`.
"""

import contextlib
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import modeling_gpt2_repro  # noqa: F401  first: it checks the environment that the libraries import in

# isort: split
import torch
from accelerate import Accelerator
from transformers.utils import logging as transformers_logging

from modeling_gpt2_repro.core.arguments import parse_arguments
from modeling_gpt2_repro.core.devices import compute_once, measure_peak_memory, prepare_cpu_process
from modeling_gpt2_repro.core.errors import UserError, reports_user_errors
from modeling_gpt2_repro.core.files import create_folder_atomically, write_json
from modeling_gpt2_repro.core.launch import start_accelerator
from modeling_gpt2_repro.core.optional import not_none
from modeling_gpt2_repro.core.streams import discard_unwritten
from modeling_gpt2_repro.core.terminal import fit_lines
from modeling_gpt2_repro.data.dataset import prefetch
from modeling_gpt2_repro.evaluation.hellaswag import evaluate_hellaswag
from modeling_gpt2_repro.evaluation.samples import generate_samples
from modeling_gpt2_repro.model.folder import save_model, save_published_model
from modeling_gpt2_repro.plots.drawer import CurveDrawer
from modeling_gpt2_repro.publishing.model_card import write_model_card
from modeling_gpt2_repro.publishing.uploader import Uploader
from modeling_gpt2_repro.training import checkpoint as checkpoints
from modeling_gpt2_repro.training import faults
from modeling_gpt2_repro.training.config import FOREIGN_FLAGS, TrainingConfig
from modeling_gpt2_repro.training.console import LABEL_INDENT, Console
from modeling_gpt2_repro.training.eval_only import evaluate_only
from modeling_gpt2_repro.training.inputs import open_inputs
from modeling_gpt2_repro.training.optim import set_learning_rate
from modeling_gpt2_repro.training.plan import describe_plan
from modeling_gpt2_repro.training.preemption import INTERRUPTED_EXIT_CODE, PREEMPTED_EXIT_CODE, Preemption
from modeling_gpt2_repro.training.preflight import check_disk, estimate_disk_bytes
from modeling_gpt2_repro.training.record import RunRecord
from modeling_gpt2_repro.training.run import Run, build_run
from modeling_gpt2_repro.training.run_folder import RunFolder
from modeling_gpt2_repro.training.smoke import describe_smoke_test
from modeling_gpt2_repro.training.start import choose_start
from modeling_gpt2_repro.training.trackers import choose_trackers


@reports_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Train GPT-2 from the token shards that prepare_data.py writes."""
    config = parse_arguments(TrainingConfig, argv, description=main.__doc__, foreign_flags=FOREIGN_FLAGS)
    transformers_logging.disable_progress_bar()
    if config.plan:
        if os.environ.get("RANK", "0") == "0":
            print("\n".join(fit_lines(describe_plan(config), LABEL_INDENT)))
        return 0
    with Preemption().handled() as preemption:
        return run_process(config.as_smoke_test() if config.smoke else config, preemption)


def run_process(config: TrainingConfig, preemption: Preemption) -> int:
    """Evaluate or train in this process, record the outcome in `status.json`, and return the exit code."""
    prepare_cpu_process()
    accelerator = start_accelerator(config.mixed_precision, tf32=config.tf32, deterministic=config.deterministic)
    console = Console(accelerator.is_main_process)
    folder = RunFolder(Path(config.output_dir) / config.run_name)
    record = RunRecord(folder, accelerator, console.say, choose_trackers(config.report_to))
    try:
        with faults.explained_nondeterminism():
            if config.eval_only:
                evaluate_only(config, accelerator)
                return 0
            return set_up_and_train(config, accelerator, record, console, preemption)
    except BaseException as error:
        record.set_failed(error)
        raise
    finally:
        with preemption.deferred():  # a signal from here on cannot change the outcome
            record.close()
        discard_unwritten()  # a closed or full stdout must not change the exit code
        if config.smoke and record.is_open:
            shutil.rmtree(record.folder.path, ignore_errors=True)


def set_up_and_train(
    config: TrainingConfig, accelerator: Accelerator, record: RunRecord, console: Console, preemption: Preemption
) -> int:
    """Set up the run, train and publish; return the exit code."""
    uploader = Uploader(record.folder, config, config.push_to_hub and accelerator.is_main_process, console.say)
    inputs = open_inputs(config, accelerator)
    start = choose_start(config, inputs, accelerator, record)
    if start.is_finished:
        console.say(f"{record.folder} is finished: {start.step:,} of {start.max_steps:,} steps")
        if accelerator.is_main_process:
            record.folder.clear_leftovers(config)
        uploader.finish()
        return 0
    uploader.check(is_resumed=start.state is not None)
    run = build_run(config, inputs, start, accelerator, record, console)
    if start.checkpoint is not None and start.is_own:
        uploader.submit(start.checkpoint)  # the run may have been killed between this checkpoint and its upload
    uploader.start(start.resumed_step)
    with (
        faults.explained_out_of_memory(config.list_divisors(run.plan.n_processes), run.plan.micro_batch_size),
        faults.explained_write_failures(record.folder.path, run.resume_hint),
        preemption.deferred(),
    ):
        return run_to_the_end(run, preemption, uploader)


def run_to_the_end(run: Run, preemption: Preemption, uploader: Uploader) -> int:
    """Train and publish, or stop early with a checkpoint on request; return the exit code."""
    with CurveDrawer(run.record.folder, run.console.say, enabled=run.accelerator.is_main_process) as curves:
        step = train(run, preemption, curves, uploader)
        if step < run.plan.last_step:
            curves.skip_final_figure()  # a preempted job has seconds left
            return stop_early(run, step)
    finish = finish_smoke_test if run.config.smoke else write_final
    if run.accelerator.is_main_process:
        finish(run)
    run.accelerator.wait_for_everyone()
    uploader.finish()  # after the barrier, so that other ranks need not wait
    return 0


def stop_early(run: Run, step: int) -> int:
    """Report that the run stopped after `step` updates, and how to resume it; return the exit code."""
    if run.config.smoke:
        run.console.say(f"the smoke test was stopped after {step:,} steps; there is nothing to resume")
        return INTERRUPTED_EXIT_CODE
    run.record.set_status("preempted", step=step)
    run.console.say(f"stopped on request after {step:,} steps: {run.resume_hint()}")
    return PREEMPTED_EXIT_CODE


def train(run: Run, preemption: Preemption, curves: CurveDrawer, uploader: Uploader) -> int:
    """The training loop: evaluate and save the model after `step` updates, then update it; return the last step."""
    plan, accelerator = run.plan, run.accelerator
    batches = read_batches(run)
    run.console.start(plan.first_step, plan.max_steps)
    for step in range(plan.first_step, plan.last_step + 1):
        stop = step < plan.last_step and preemption.is_requested(accelerator)
        needs_evaluation = run.is_eval_due(step)
        # A preempted job has seconds left and an evaluation can take minutes, so the resumed run evaluates instead.
        if needs_evaluation and not stop:
            with run.clock.measure("evaluation"):
                evaluate(run, step)
            curves.request()
            needs_evaluation = False
        if run.is_save_due(step, stop):
            with run.clock.measure("checkpoint"):
                is_saved = save(run, step, is_evaluated=not needs_evaluation, uploader=uploader)
            if stop and not is_saved:
                raise UserError(f"stopped on request, but could not save a checkpoint: {run.resume_hint()}")
        if stop or step == plan.last_step:
            break
        if not run.is_skipped(step):
            update(run, step, batches)
    run.console.close()
    return step


def read_batches(run: Run) -> Iterator[torch.Tensor]:
    """Return this rank's micro-batches of all remaining updates, in order, each of shape (micro_batch_size, T+1)."""
    config, plan = run.config, run.plan
    steps = (step for step in range(plan.first_step, plan.last_step) if not run.is_skipped(step))
    micro_batches = run.order.divide_steps(
        steps, config.windows_per_step, plan.n_processes, run.accelerator.process_index, plan.micro_batch_size
    )
    return prefetch(not_none(run.inputs.train_set), micro_batches, run.accelerator.device)


def update(run: Run, step: int, batches: Iterator[torch.Tensor]) -> None:
    """Make update `step + 1`: forward and backward over its micro-batches, clip, and step the optimizer.

    Raises:
        NonFiniteError: the loss or the gradient norm is not finite; the update is not applied.
        RepeatedOverflowError: under fp16, too many consecutive updates overflowed.
    """
    config, plan, accelerator, optimizer = run.config, run.plan, run.accelerator, run.optimizer
    # Dropout masks depend on step and rank only, so that a resumed run draws the same ones.
    torch.manual_seed(config.seed + step * plan.n_processes + accelerator.process_index)
    started = time.perf_counter()
    learning_rate = run.schedule(step)
    set_learning_rate(optimizer, learning_rate)
    loss, waited = accumulate_gradients(run, batches)
    grad_norm = not_none(accelerator.clip_grad_norm_(run.model.parameters(), config.grad_clip))
    loss, grad_norm = torch.stack([accelerator.reduce(loss, reduction="mean"), grad_norm]).tolist()
    # Under fp16 the loss scaler handles infinite gradients: it skips the update and lowers its scale.
    if not math.isfinite(loss) or (not math.isfinite(grad_norm) and accelerator.scaler is None):
        raise faults.NonFiniteError(
            step + 1, loss, grad_norm, run.order.windows_of_step(step, config.windows_per_step)
        )
    run.n_overflows = 0 if math.isfinite(grad_norm) else run.n_overflows + 1
    if run.n_overflows >= faults.MOST_OVERFLOWS:
        raise faults.RepeatedOverflowError(step + 1, run.n_overflows)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    seconds = time.perf_counter() - started
    run.clock.seconds["update"].append(seconds)
    tokens_per_second = config.tokens_per_step / seconds
    # `training/metrics.py` documents every metric, and what else a new one may need.
    metrics = {
        "train/loss": loss,
        "train/lr": learning_rate,
        "train/grad_norm": grad_norm,
        "train/tokens_per_second": tokens_per_second,
        "train/mfu": tokens_per_second * plan.flops_per_token / (plan.n_processes * run.peak.flops),
        "train/data_wait_seconds": waited,
        **plan.count_progress(step + 1),
        "train/elapsed_seconds": time.monotonic() - run.record.started,
        "train/peak_memory_gb": measure_peak_memory(accelerator.device),
    }
    run.record.log(step + 1, metrics)
    run.console.show_step(step + 1, metrics)


def accumulate_gradients(run: Run, batches: Iterator[torch.Tensor]) -> tuple[torch.Tensor, float]:
    """Run the micro-steps of an update; return this rank's mean loss and the seconds it waited for data."""
    accelerator, n_micro_steps = run.accelerator, run.plan.n_micro_steps
    loss, waited = torch.zeros((), device=accelerator.device), 0.0
    for micro_step in range(n_micro_steps):
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked
        is_last = micro_step == n_micro_steps - 1
        with contextlib.nullcontext() if is_last else accelerator.no_sync(run.loss_model):
            micro_loss = run.loss_model(batch) / n_micro_steps
            accelerator.backward(micro_loss)
        loss += micro_loss.detach()
    return loss, waited


def evaluate(run: Run, step: int) -> None:
    """Compute validation loss, HellaSwag and samples of the model after `step` updates, each if due."""
    config, plan, record = run.config, run.plan, run.record
    metrics: dict[str, float] = {}
    lines: list[str] = []
    if plan.is_due(config.eval_every, step):
        validation = run.inputs.evaluate_loss(run.model, plan.micro_batch_size, run.accelerator)
        metrics |= {"val/loss": validation.loss, "val/bpb": validation.bpb}
        lines.append(f"val/loss {validation.loss:.4f}, val/bpb {validation.bpb:.4f}")
        if config.save_best and metrics["val/loss"] < record.best_val_loss and run.accelerator.is_main_process:
            save_best(run, step, metrics)
    if plan.is_due(config.hellaswag_every, step):
        # Papers cite the `lm_eval` protocol, so the finished model gets both scores.
        for protocol in ("original", "lm_eval") if step == plan.last_step else ("original",):
            encoded = not_none(run.inputs.hellaswag).encode(protocol)
            with run.accelerator.autocast():
                result = evaluate_hellaswag(run.model, encoded, accelerator=run.accelerator, show_progress=False)
            metrics |= result.metrics()
            lines += result.describe()
    if metrics:
        record.log(step, metrics)
        run.console.say(*(f"step {step}: {line}" for line in lines))
    if plan.is_due(config.sample_every, step) and run.accelerator.is_main_process:
        prompt, seed = config.sample_prompt, config.seed + step
        texts = generate_samples(run.model, run.inputs.tokenizer, prompt, n_tokens=config.sample_tokens, seed=seed)
        record.log_samples(step, texts)
        run.console.say(f"step {step} sample: {texts[0]!r}")


def save_best(run: Run, step: int, metrics: dict[str, float]) -> None:
    """Write `best/` on rank 0; if the disk is full, skip it and continue training."""
    folder = run.record.folder
    with (
        faults.tolerated_write_failures("the best model was not written", run.console.say),
        create_folder_atomically(folder.best) as temporary,
    ):
        save_model(temporary, run.model, run.inputs.tokenizer)
        write_json(temporary / folder.best_metrics.name, {"step": step, **metrics})
    run.record.read_best(step)  # a write that failed late may have replaced it nevertheless


def save(run: Run, step: int, *, is_evaluated: bool, uploader: Uploader) -> bool:
    """Save the model after `step` updates; return on every rank whether it was written."""
    run.record.check_claim()
    return compute_once(lambda: write_checkpoint(run, step, is_evaluated, uploader), run.accelerator)


def write_checkpoint(run: Run, step: int, is_evaluated: bool, uploader: Uploader) -> bool:
    """Write a checkpoint and delete old ones; return whether it was written. A full disk does not stop training."""
    is_saved, started, config, folder = False, time.perf_counter(), run.config, run.record.folder
    with faults.tolerated_write_failures(f"the checkpoint of step {step} was not written", run.console.say):
        folder.sync()
        check_disk(folder.checkpoints, estimate_disk_bytes(run.plan.n_parameters, n_saves=1, keep_checkpoints=1))
        state = run.describe_state(step, is_evaluated)
        checkpoint = checkpoints.save_checkpoint(
            folder.checkpoints, state, run.model, run.inputs.tokenizer, run.optimizer, run.accelerator.scaler
        )
        is_saved = True
        uploader.submit(checkpoint)
    with faults.tolerated_write_failures("an old checkpoint was not deleted", run.console.say):
        checkpoints.prune_checkpoints(folder.checkpoints, config.keep_checkpoints, config.keep_weights_every)
    run.record.log(step, {"train/checkpoint_seconds": time.perf_counter() - started})
    return is_saved


def write_final(run: Run) -> None:
    """Write `final/` on rank 0: the model in published form, its tokenizer, and a model card."""
    run.record.check_claim()
    folder = run.record.folder
    with create_folder_atomically(folder.final) as temporary:
        save_published_model(temporary, run.model, run.inputs.tokenizer)
        write_model_card(temporary, folder)
    run.record.finish(run.plan.max_steps)
    run.console.say(f"finished: model in {folder.final}, curves in {folder.curves}")


def finish_smoke_test(run: Run) -> None:
    """Reload the smoke test's checkpoint on rank 0, and report what was measured.

    Raises:
        UserError: there is no checkpoint, because it could not be written.
        AssertionError: the checkpoint does not reload bit for bit.
    """
    saved = checkpoints.list_checkpoints(run.record.folder.checkpoints)
    if not saved:
        raise UserError("the smoke test could not write a checkpoint, and a run could not either: see above")
    checkpoints.check_reload(saved[-1], run.model, run.optimizer)
    peak_memory = measure_peak_memory(run.accelerator.device)
    run.console.say(*describe_smoke_test(run.plan, run.clock, run.peak, peak_memory))


if __name__ == "__main__":
    sys.exit(main())
