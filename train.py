"""Train GPT-2 from token shards.

One device: `python train.py`; several: `accelerate launch --config_file accelerate_config.yaml train.py`. The defaults
reproduce GPT-2 124M, and any number of devices runs the same experiment.
"""

import contextlib
import dataclasses
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from modeling_gpt2_repro import GPT2ReproForCausalLM
from modeling_gpt2_repro.arguments import parse_arguments
from modeling_gpt2_repro.data.dataset import TokenDataset, load_data_tokenizer, read_ahead
from modeling_gpt2_repro.data.order import WindowOrder
from modeling_gpt2_repro.data.tokenization import token_byte_lengths
from modeling_gpt2_repro.devices import (
    describe_device,
    get_largest_micro_batch_size,
    measure_peak_memory,
    prepare_cpu_process,
    start_accelerator,
)
from modeling_gpt2_repro.errors import UserError, reports_user_errors
from modeling_gpt2_repro.evaluation.hellaswag import EncodedHellaSwag, encode_hellaswag, evaluate_hellaswag
from modeling_gpt2_repro.evaluation.hellaswag_data import load_hellaswag
from modeling_gpt2_repro.evaluation.sampling import encode_prompt, generate_samples
from modeling_gpt2_repro.evaluation.validation import evaluate_loss
from modeling_gpt2_repro.files import create_folder_atomically
from modeling_gpt2_repro.reporting.model_card import write_model_card
from modeling_gpt2_repro.reporting.plots import draw_curves
from modeling_gpt2_repro.training import checkpoint as checkpoints
from modeling_gpt2_repro.training.config import KNOWN_ELSEWHERE, TrainingConfig
from modeling_gpt2_repro.training.console import Console
from modeling_gpt2_repro.training.micro_step import WindowLoss, fit_micro_batch
from modeling_gpt2_repro.training.optim import build_adamw, set_learning_rate
from modeling_gpt2_repro.training.plan import Plan, count_flops_per_token
from modeling_gpt2_repro.training.schedule import compute_learning_rate
from modeling_gpt2_repro.training.tracking import RunRecord, choose_tracker
from modeling_gpt2_repro.weights import build_model


@dataclasses.dataclass
class Run:
    """What the loop works with. `model` is the plain module; `loss_model` wraps it, compiled and distributed."""

    config: TrainingConfig
    plan: Plan
    accelerator: Accelerator
    record: RunRecord
    console: Console
    tokenizer: PreTrainedTokenizerBase
    train_set: TokenDataset
    val_set: TokenDataset | None
    hellaswag: EncodedHellaSwag | None
    model: GPT2ReproForCausalLM
    loss_model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    experiment: dict


@reports_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Train GPT-2 from the token shards that prepare_data.py writes."""
    config = parse_arguments(TrainingConfig, argv, description=main.__doc__, known_elsewhere=KNOWN_ELSEWHERE)
    transformers_logging.disable_progress_bar()
    prepare_cpu_process()
    torch.set_float32_matmul_precision("high")  # TF32 for what stays in float32
    accelerator = start_accelerator(config.mixed_precision, choose_tracker(config.report_to))
    record = RunRecord(Path(config.output_dir) / config.run_name, accelerator)
    try:
        run = set_up(config, accelerator, record)
        if run is not None:
            train(run)
    except BaseException as error:
        record.set_status("failed", error=f"{type(error).__name__}: {error}")
        raise
    finally:
        accelerator.end_training()
    return 0


def set_up(config: TrainingConfig, accelerator: Accelerator, record: RunRecord) -> Run | None:
    """Build everything that the loop needs and say what it will do; `None` where the run is finished already."""
    console = Console(enabled=accelerator.is_main_process)
    tokenizer = load_data_tokenizer(config.data_dir)
    train_set = TokenDataset(config.data_dir, "train", config.sequence_length, len(tokenizer))
    val_set = (
        TokenDataset(config.data_dir, "val", config.sequence_length, len(tokenizer)) if config.eval_every else None
    )
    hellaswag = None
    if config.hellaswag_every:
        with accelerator.main_process_first():
            items = load_hellaswag(config.hellaswag_file, config.hellaswag_limit)
        hellaswag = encode_hellaswag(items, tokenizer, "original")

    max_steps = config.derive_max_steps(len(train_set))
    experiment = {**config.experiment, "max_steps": max_steps, "train_tokens": train_set.n_tokens}
    resume_from = checkpoints.choose_checkpoint(config.resume_from_checkpoint, record.folder / "checkpoints")
    first_step = checkpoints.check_experiment(resume_from, experiment) if resume_from else 0
    is_finished = (record.folder / "final").is_dir()
    if is_finished and resume_from and first_step >= max_steps:
        console.say(f"{record.folder} is finished: it has {first_step:,} of {max_steps:,} steps")
        return None
    if is_finished and resume_from is None and config.resume_from_checkpoint == "auto":
        raise UserError(
            f"{record.folder} holds a finished run: give another --run_name, or --resume_from_checkpoint never to "
            "replace it"
        )

    source = str(resume_from) if resume_from else config.init_from
    model = build_model(source, config, tokenizer).to(accelerator.device).train()
    if config.sample_every:  # to hear of a prompt that does not fit now, and not at the first sample
        encode_prompt(model, tokenizer, config.sample_prompt, config.sample_tokens)
    model.loss_chunk_tokens = config.loss_chunk_tokens
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable()
    optimizer = build_adamw(model, config.learning_rate, config.weight_decay, (config.beta1, config.beta2))
    if resume_from:
        checkpoints.load_optimizer(resume_from, optimizer)

    console.say(f"run         {record.folder}, tracker {choose_tracker(config.report_to) or 'none'}")
    console.say(f"device      {describe_device(accelerator, config.mixed_precision)}")
    console.say(f"model       {model.num_parameters():,} parameters, from {source}, dropout {config.dropout:g}")
    console.say(
        f"data        {config.data_dir}: {train_set.n_tokens:,} training tokens, "
        f"{'shuffled' if train_set.is_shuffled else 'in source order'}"
    )
    largest = get_largest_micro_batch_size(accelerator.device, config.sequence_length)
    loss_model, micro_batch_size, seconds_per_token = fit_micro_batch(
        WindowLoss(model),
        train_set,
        config.list_micro_batch_sizes(accelerator.num_processes, largest),
        config.compile,
        accelerator,
        console.say,
    )
    loss_model, optimizer = accelerator.prepare(loss_model, optimizer)
    plan = Plan(
        n_processes=accelerator.num_processes,
        micro_batch_size=micro_batch_size,
        first_step=first_step,
        max_steps=max_steps,
        n_windows=len(train_set),
        seconds_per_token=seconds_per_token,
        flops_per_token=count_flops_per_token(model, config.sequence_length),
    )
    eval_tokens = min(config.eval_tokens, val_set.n_tokens) if val_set else 0
    for line in plan.describe(config, eval_tokens, hellaswag.n_tokens if hellaswag else 0):
        console.say(line)
    record.start(config, first_step if resume_from else None)
    return Run(
        config=config,
        plan=plan,
        accelerator=accelerator,
        record=record,
        console=console,
        tokenizer=tokenizer,
        train_set=train_set,
        val_set=val_set,
        hellaswag=hellaswag,
        model=model,
        loss_model=loss_model,
        optimizer=optimizer,
        experiment=experiment,
    )


def train(run: Run) -> None:
    """The loop: evaluate and save the model after `step` updates, and make the next update."""
    config, plan, accelerator, optimizer = run.config, run.plan, run.accelerator, run.optimizer
    order = WindowOrder(plan.n_windows, config.seed, config.first_permuted_epoch(run.train_set.is_shuffled))
    steps = range(plan.first_step, plan.max_steps)
    micro_batches = order.divide_steps(
        steps, config.windows_per_step, plan.n_processes, accelerator.process_index, plan.micro_batch_size
    )
    batches = read_ahead(run.train_set, micro_batches, accelerator.device)
    n_micro_steps = config.windows_per_step // (plan.n_processes * plan.micro_batch_size)
    run.console.start(plan.first_step, plan.max_steps)
    for step in range(plan.first_step, plan.max_steps + 1):
        if step == 0 or step > plan.first_step:  # a resumed step was evaluated before it was saved
            evaluate(run, step)
        if step > plan.first_step and plan.is_due(config.save_every, step):
            save(run, step)
        if step == plan.max_steps:
            break

        # Dropout's masks follow from the step, so that a resumed run draws the same.
        torch.manual_seed(config.seed + step * plan.n_processes + accelerator.process_index)
        started = time.perf_counter()
        learning_rate = compute_learning_rate(
            step,
            max_steps=plan.max_steps,
            warmup_steps=config.warmup_steps,
            peak=config.learning_rate,
            min_ratio=config.min_lr_ratio,
            schedule=config.lr_schedule,
        )
        set_learning_rate(optimizer, learning_rate)
        loss = torch.zeros((), device=accelerator.device)
        for micro_step in range(n_micro_steps):
            batch = next(batches)
            is_last_micro_step = micro_step == n_micro_steps - 1
            with contextlib.nullcontext() if is_last_micro_step else accelerator.no_sync(run.loss_model):
                micro_loss = run.loss_model(batch) / n_micro_steps
                accelerator.backward(micro_loss)
            loss += micro_loss.detach()
        grad_norm = accelerator.clip_grad_norm_(run.model.parameters(), config.grad_clip).item()
        if not math.isfinite(grad_norm) and accelerator.scaler is None:  # fp16's scaler skips such steps
            raise UserError(
                f"the gradient of step {step + 1} is not finite: lower --learning_rate; no checkpoint was overwritten"
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss = accelerator.reduce(loss, reduction="mean").item()

        metrics = {
            "train/loss": loss,
            "train/lr": learning_rate,
            "train/grad_norm": grad_norm,
            "train/tokens_per_second": config.tokens_per_step / (time.perf_counter() - started),
            **plan.count_progress(step + 1, config),
            "train/elapsed_seconds": time.monotonic() - run.record.started,
            "train/peak_memory_gb": measure_peak_memory(accelerator.device),
        }
        run.record.log(step + 1, metrics)
        run.console.show_step(step + 1, metrics)
    run.console.close()
    publish(run)


def evaluate(run: Run, step: int) -> None:
    """Validate, score HellaSwag, sample and draw curves of the model after `step` updates, each where it is due."""
    config, plan, accelerator = run.config, run.plan, run.accelerator
    metrics = {}
    if plan.is_due(config.eval_every, step):
        validation = evaluate_loss(
            run.model,
            run.val_set,
            config.eval_tokens // config.sequence_length,
            batch_size=plan.micro_batch_size,
            token_byte_lengths=token_byte_lengths(run.tokenizer),
            accelerator=accelerator,
        )
        metrics |= {"val/loss": validation.loss, "val/bpb": validation.bpb}
    if plan.is_due(config.hellaswag_every, step):
        with accelerator.autocast():
            result = evaluate_hellaswag(run.model, run.hellaswag, accelerator=accelerator, show_progress=False)
        metrics |= {"hellaswag/acc_norm": result.acc_norm, "hellaswag/acc": result.acc}
    if metrics:
        run.record.log(step, metrics)
        run.console.say(f"step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
    if plan.is_due(config.sample_every, step) and accelerator.is_main_process:
        texts = generate_samples(
            run.model, run.tokenizer, config.sample_prompt, n_tokens=config.sample_tokens, seed=config.seed + step
        )
        run.record.log_samples(step, texts)
        run.console.say(f"step {step} sample: {texts[0]!r}")
    if (metrics or step == plan.max_steps) and accelerator.is_main_process:
        draw_curves(run.record.folder)


def save(run: Run, step: int) -> None:
    """Write a checkpoint of the model after `step` updates."""
    if run.accelerator.is_main_process:
        checkpoints.save_checkpoint(
            run.record.folder / "checkpoints",
            step,
            run.model,
            run.tokenizer,
            run.optimizer,
            run.experiment,
            run.config.keep_checkpoints,
        )
    run.accelerator.wait_for_everyone()


def publish(run: Run) -> None:
    """Write `final/`: the model as GPT-2, with its tokenizer and a card that says how it came to be."""
    if run.accelerator.is_main_process:
        with create_folder_atomically(run.record.folder / "final") as folder:
            checkpoints.save_published_model(folder, run.model, run.tokenizer)
            write_model_card(folder, run.record.folder)
        run.record.set_status("finished", step=run.plan.max_steps)
        run.console.say(
            f"finished: {run.record.folder / 'final'} holds the model, and curves.png beside it the curves"
        )
    run.accelerator.wait_for_everyone()


if __name__ == "__main__":
    sys.exit(main())
