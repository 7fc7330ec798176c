"""The settings of a training run, and the arithmetic that follows from them."""

import math
import os
import re
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from modeling_gpt2_repro.core.arguments import setting
from modeling_gpt2_repro.core.errors import UserError
from modeling_gpt2_repro.training.skipping import parse_skips

# Names that people bring along from nanoGPT, llm.c and the transformers Trainer.
FOREIGN_FLAGS = {
    "batch_size": "the batch is set by --tokens_per_step (tokens, all devices together) and what fits on a device by "
    "--micro_batch_size (sequences)",
    "block_size": "use --sequence_length (tokens)",
    "compute_dtype": "use --mixed_precision (bf16, fp16 or no)",
    "dataset": "use --data_dir, the folder that prepare_data.py wrote",
    "decay_lr": "use --lr_schedule (cosine, wsd or constant)",
    "dtype": "use --mixed_precision (bf16, fp16 or no)",
    "eval_interval": "use --eval_every (steps)",
    "eval_iters": "use --eval_tokens (tokens, the same ones at every evaluation and on any hardware)",
    "eval_steps": "use --eval_every (steps)",
    "full_determinism": "use --deterministic",
    "gradient_accumulation_steps": "it is derived: --tokens_per_step / (--micro_batch_size x --sequence_length x "
    "processes)",
    "hub_private_repo": "a new repository is private unless --hub_public",
    "hub_strategy": "--push_to_hub uploads every checkpoint's model with a tag, and the finished model",
    "hub_token": "run `hf auth login` or set HF_TOKEN: a token has no place in a command or a file",
    "input_bin": "use --data_dir, a folder of shards",
    "learning_rate_decay_frac": "use --min_lr_ratio (a fraction of --learning_rate)",
    "log_interval": "every step is logged to metrics.jsonl",
    "logging_steps": "every step is logged to metrics.jsonl",
    "lr": "use --learning_rate",
    "lr_decay_iters": "the schedule ends at --max_steps",
    "lr_scheduler_type": "use --lr_schedule (cosine, wsd or constant)",
    "max_grad_norm": "use --grad_clip",
    "max_iters": "use --max_steps (optimizer updates) or --epochs",
    "max_lr": "use --learning_rate",
    "max_train_steps": "use --max_steps (optimizer updates) or --epochs",
    "min_lr": "use --min_lr_ratio (a fraction of --learning_rate)",
    "model": "use --model_size, or --init_from for existing weights",
    "model_name_or_path": "use --init_from",
    "num_iterations": "use --max_steps (optimizer updates)",
    "num_train_epochs": "use --epochs",
    "out_dir": "use --output_dir and --run_name; the run folder is output_dir/run_name",
    "per_device_train_batch_size": "use --micro_batch_size (sequences a device and micro-step); the batch is set by "
    "--tokens_per_step",
    "sample_every_steps": "use --sample_every (steps)",
    "save_steps": "use --save_every (steps)",
    "save_total_limit": "use --keep_checkpoints",
    "total_batch_size": "use --tokens_per_step (tokens, all devices together)",
    "val_loss_every": "use --eval_every (steps)",
    "wandb_log": "use --report_to wandb",
    "wandb_run_name": "use --run_name",
    "warmup_iters": "use --warmup_tokens (tokens: steps x --tokens_per_step)",
    "warmup_steps": "use --warmup_tokens (tokens: steps x --tokens_per_step)",
}


# Settings that leave the weights as they are, or may be spelled in several ways, as the shape: they may differ when a
# run is resumed.
OPERATIONAL = {
    *("model_size", "n_layer", "n_head", "n_embd"),
    *("data_dir", "output_dir", "run_name", "epochs", "max_steps", "micro_batch_size", "compile"),
    "deterministic",
    *("loss_chunk_tokens", "eval_only"),
    *("gradient_checkpointing", "eval_every", "eval_tokens", "hellaswag_every", "hellaswag_file", "hellaswag_limit"),
    *("sample_every", "sample_prompt", "sample_tokens", "save_every", "keep_checkpoints", "resume_from_checkpoint"),
    *("keep_weights_every", "save_best"),
    *("push_to_hub", "hub_model_id", "hub_public"),
    *("report_to", "wandb_project", "skip_steps", "plan", "plan_tokens_per_second", "smoke", "yes"),
}
TRACKERS = ("wandb", "tensorboard")
SMOKE_STEPS = 10
# More than any run has: slips of the pen, which would take for ever to be refused by the machine.
LARGEST = {
    **{"n_layer": 1000, "n_head": 2**17, "n_embd": 2**17, "sequence_length": 2**24, "tokens_per_step": 2**30},
    **{"epochs": 10**6, "max_steps": 10**12},
}


@dataclass
class TrainingConfig:
    """Every knob of `train.py`. The defaults are the reproduction of GPT-2 124M on 10 B tokens of FineWeb-Edu."""

    data_dir: str = setting("data/edu_fineweb10B", "folder of token shards, as prepare_data.py writes it", path=True)
    output_dir: str = setting("runs", "folder of all runs", path=True)
    run_name: str = setting("gpt2_124M", "name of this run; its folder is output_dir/run_name")

    model_size: str | None = setting(
        None, "shape of the model: 124M, 350M, 774M or 1558M; not given: 124M from scratch, else init_from's own"
    )
    n_layer: int | None = setting(None, "transformer blocks, in place of model_size's")
    n_head: int | None = setting(None, "attention heads, in place of model_size's")
    n_embd: int | None = setting(None, "width, in place of model_size's")
    init_from: str = setting(
        "scratch",
        "scratch, or a GPT-2-shaped model to start from (with eval_only any causal language model): a Hub id or a "
        "folder",
        path=True,
    )

    sequence_length: int = setting(1024, "tokens in a sequence; also the positions of a model from scratch")
    tokens_per_step: int = setting(524288, "tokens in an optimizer update, all devices together")
    micro_batch_size: str = setting(
        "auto",
        "sequences a device takes at once; never changes the experiment; auto: what is calculated to fit, 64 at most "
        "(fewer on a CPU), less while memory runs out before the first step; a resumed run keeps it",
    )
    epochs: float = setting(1.0, "passes over the training tokens, fractions allowed; max_steps wins over it")
    max_steps: int | None = setting(None, "optimizer updates; derived from epochs where not given")
    shuffle_windows: Literal["auto", "on", "off"] = setting(
        "auto", "order of windows; auto: permuted, except in the first epoch over a corpus that is shuffled already"
    )

    learning_rate: float = setting(6e-4, "peak learning rate (GPT-3 paper, table 2.1)")
    min_lr_ratio: float = setting(0.1, "last learning rate, as a fraction of the peak")
    warmup_tokens: int = setting(375_000_000, "tokens of linear warm-up (GPT-3 paper, appendix B)")
    lr_schedule: Literal["cosine", "wsd", "constant"] = setting("cosine", "what follows the warm-up")
    weight_decay: float = setting(0.1, "AdamW's decay of every tensor of two or more dimensions")
    beta1: float = setting(0.9, "AdamW's decay of the gradient mean")
    beta2: float = setting(0.95, "AdamW's decay of the squared-gradient mean")
    grad_clip: float = setting(1.0, "largest global gradient norm; inf: gradients are not clipped")
    dropout: float = setting(
        0.0, "probability, at embeddings, attention and residuals; OpenAI trained with 0.1 and several epochs"
    )

    mixed_precision: Literal["bf16", "fp16", "no"] = setting(
        "bf16", "autocast; where the device has no bf16 the run uses float32 and says so"
    )
    tf32: bool = setting(True, "compute what stays in float32 as TF32 where the device has it; False: exactly, slower")
    compile: Literal["auto", "on", "off"] = setting(
        "auto", "torch.compile of the training step; auto: where a compiler for the device is found and works"
    )
    deterministic: bool = setting(
        False,
        "on a GPU, use only operations that give the same bits at every call, so that a run resumed on the same GPUs "
        "ends with the same bits; slower. A CPU always does",
    )
    loss_chunk_tokens: int | None = setting(
        None,
        "tokens whose logits exist at once in the loss; a matter of speed and memory; not given: 1024 on a CPU, "
        "8192 on CUDA",
    )
    gradient_checkpointing: bool = setting(False, "recompute activations in the backward pass: less memory, slower")

    eval_every: int = setting(250, "steps between validations; 0: never")
    eval_tokens: int = setting(10_485_760, "validation tokens, from the front of the split; the same on any hardware")
    hellaswag_every: int = setting(250, "steps between HellaSwag scores; 0: never")
    hellaswag_file: str | None = setting(
        None, "HellaSwag items as .jsonl or .parquet; not given: the Hub's validation set", path=True
    )
    hellaswag_limit: int | None = setting(None, "score the first items only; not given: all")
    eval_only: bool = setting(
        False,
        "train nothing: print validation loss (unless eval_every is 0) and HellaSwag (unless hellaswag_every is 0) of "
        "init_from, whose tokenizer has to be the data's, and keep them in data_dir/baselines.json",
    )
    sample_every: int = setting(250, "steps between samples; 0: never")
    sample_prompt: str = setting("Hello, I'm a language model,", "text that the samples continue")
    sample_tokens: int = setting(32, "tokens of a sample, the prompt's included")
    save_every: int = setting(1000, "steps between checkpoints, and one at the end; 0: never")
    keep_checkpoints: int = setting(2, "newest checkpoints to keep; 0: all")
    keep_weights_every: int = setting(
        0,
        "steps between checkpoints whose model is kept for good, when what training needs of them is gone; a multiple "
        "of save_every; 0: none",
    )
    save_best: bool = setting(False, "keep the model of the lowest validation loss in best/")
    resume_from_checkpoint: str = setting(
        "auto",
        "auto: the newest checkpoint of the run folder, if any; never: replace what is in the run folder; or a path, "
        "which may be of another run's checkpoint until this run has a newer one",
        aliases=["--resume"],
        path=True,
    )

    skip_steps: list[str] = setting(
        [],
        "updates to pass over because their data break the run, as A:B, both included; several may be given; kept in "
        "the checkpoints",
    )

    seed: int = setting(1337, "of the initial weights, the window order and the samples")
    report_to: str = setting(
        "auto",
        "trackers: wandb, tensorboard, or both with a comma between; auto: wandb if a key is present, else none",
    )
    wandb_project: str = setting("gpt2-repro", "wandb project")
    push_to_hub: bool = setting(
        False,
        "upload the finished model to the Hugging Face Hub, and every checkpoint's model, tagged step-0000250 or the "
        "like, beside the training; the token is that of `hf auth login` or HF_TOKEN",
    )
    hub_model_id: str | None = setting(
        None, "the repository, as user/name or a name of yours; not given: run_name in your namespace"
    )
    hub_public: bool = setting(False, "let everybody see the repository; not given: a new one is private")

    plan: bool = setting(False, "print the arithmetic of the run and exit: nothing is computed, no device is needed")
    plan_tokens_per_second: float | None = setting(
        None, "rate, of all devices together, at which --plan counts the hours; not given: a few examples"
    )
    smoke: bool = setting(
        False,
        f"try the run out: {SMOKE_STEPS} real steps, one evaluation, a checkpoint saved and loaded again; then print "
        "measured tokens/s, peak memory and hours, and leave nothing behind",
    )
    yes: bool = setting(False, "start also what is projected to take more than a week on a CPU")

    def __post_init__(self) -> None:
        positive = ("sequence_length", "tokens_per_step", "sample_tokens", "learning_rate", "grad_clip", "epochs")
        for name in positive:
            if not getattr(self, name) > 0:
                raise UserError(f"--{name} has to be above 0, not {getattr(self, name)}")
        not_negative = (
            *("eval_every", "hellaswag_every", "sample_every", "save_every", "keep_checkpoints", "warmup_tokens"),
            "keep_weights_every",
            *("min_lr_ratio", "weight_decay", "seed"),
        )
        for name in not_negative:
            if not getattr(self, name) >= 0:
                raise UserError(f"--{name} has to be 0 or more, not {getattr(self, name)}")
        at_least_one = ("max_steps", "hellaswag_limit", "n_layer", "n_head", "n_embd", "loss_chunk_tokens")
        for name in (*at_least_one, "plan_tokens_per_second"):
            if getattr(self, name) is not None and not getattr(self, name) >= 1:
                raise UserError(f"--{name} has to be 1 or more, not {getattr(self, name)}")
        for name, largest in LARGEST.items():
            if getattr(self, name) is not None and getattr(self, name) > largest:
                raise UserError(f"--{name} has to be {largest:,} or less, not {getattr(self, name):,}")
        for name in ("learning_rate", "min_lr_ratio", "weight_decay", "plan_tokens_per_second"):
            if not math.isfinite(getattr(self, name) or 0.0):
                raise UserError(f"--{name} has to be finite, not {getattr(self, name)}")
        if self.seed >= 2**63:
            raise UserError(f"use a --seed below 2**63, not {self.seed}")
        for name in ("beta1", "beta2", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"--{name} has to be in [0, 1), not {getattr(self, name)}")
        if self.eval_every and self.eval_tokens < self.sequence_length:
            raise UserError(f"--eval_tokens ({self.eval_tokens:,}) has to be at least one --sequence_length")
        if self.eval_only and self.init_from == "scratch":
            raise UserError("--eval_only needs a model: give --init_from a Hub id, such as gpt2, or a folder")
        if self.eval_only and not self.eval_every and not self.hellaswag_every:
            raise UserError("--eval_only has nothing to evaluate: --eval_every and --hellaswag_every are both 0")
        if not self.eval_only and self.tokens_per_step % self.sequence_length:
            lower = self.tokens_per_step // self.sequence_length * self.sequence_length
            raise UserError(
                f"--tokens_per_step {self.tokens_per_step:,} is not a multiple of --sequence_length "
                f"{self.sequence_length:,}: use {lower or self.sequence_length:,}"
            )
        if self.save_every and self.keep_weights_every % self.save_every:
            more = self.keep_weights_every // self.save_every * self.save_every + self.save_every
            raise UserError(
                f"--keep_weights_every {self.keep_weights_every:,} is not a multiple of --save_every "
                f"{self.save_every:,}, and only what is saved can be kept: use {more:,}, or another --save_every"
            )
        if self.micro_batch_size != "auto" and not re.fullmatch(r"0{0,9}[1-9][0-9]{0,9}", self.micro_batch_size):
            raise UserError(f"--micro_batch_size has to be auto or 1 or more, not {self.micro_batch_size}")
        self.skips  # noqa: B018, to hear of a mistake in it now
        if self.report_to not in ("auto", "none") and not set(self.report_to.split(",")) <= set(TRACKERS):
            raise UserError(
                f"--report_to {self.report_to!r}: has to be auto, none, or one or more of {', '.join(TRACKERS)} with "
                "commas and no spaces between"
            )
        if "/" in self.run_name or self.run_name in ("", ".", ".."):
            raise UserError(f"--run_name {self.run_name!r} has to be a plain folder name (see --output_dir)")

    @property
    def experiment(self) -> dict[str, Any]:
        """The settings that decide the weights, which a resumed run may not change."""
        return {name: value for name, value in asdict(self).items() if name not in OPERATIONAL}

    @property
    def skips(self) -> list[range]:
        """The updates that `skip_steps` says to pass over."""
        return parse_skips(self.skip_steps)

    def as_smoke_test(self) -> "TrainingConfig":
        """Return the settings of a trial that leaves the run folder alone and reports to nobody."""
        return replace(
            self,
            run_name=f"{self.run_name}-smoke-{os.getpid()}",  # nobody's folder but the trial's
            resume_from_checkpoint="never",
            report_to="none",
            push_to_hub=False,
            save_every=self.save_every or SMOKE_STEPS,
            keep_weights_every=0,
        )

    @property
    def windows_per_step(self) -> int:
        """Sequences in an optimizer update, all devices together."""
        return self.tokens_per_step // self.sequence_length

    @property
    def warmup_steps(self) -> int:
        """Updates of linear warm-up: 715 of 524,288 tokens for the GPT-3 paper's 375 million."""
        return self.warmup_tokens // self.tokens_per_step

    def first_permuted_epoch(self, is_shuffled: bool) -> int | None:
        """Return the first epoch whose windows are permuted, `None` for never; a shuffled corpus waits one epoch."""
        return {"auto": 1 if is_shuffled else 0, "on": 0, "off": None}[self.shuffle_windows]

    def derive_max_steps(self, n_windows: int) -> int:
        """Return the updates of the run: as set, or the whole ones that `epochs` passes over `n_windows` windows give.

        Raises:
            UserError: they do not fill a single update.
        """
        max_steps = self.max_steps or math.floor(self.epochs * n_windows / self.windows_per_step)
        if max_steps < 1:
            raise UserError(
                f"the training split has {n_windows:,} sequences of {self.sequence_length:,} tokens; "
                f"{self.epochs:g} epoch(s) do not fill one step of {self.windows_per_step:,}: prepare more text, "
                "lower --tokens_per_step, or give --max_steps"
            )
        return max_steps

    def list_divisors(self, n_processes: int) -> list[int]:
        """Return the micro-batch sizes that divide a process's share of a step, largest first."""
        share = self.windows_per_step // n_processes
        small = [size for size in range(1, math.isqrt(share) + 1) if share % size == 0]
        return sorted({*small, *(share // size for size in small)}, reverse=True)

    def list_micro_batch_sizes(self, n_processes: int, largest: int) -> list[int]:
        """Return the micro-batch sizes to try, largest first: as set, or for `auto` all that divide, up to `largest`.

        Raises:
            UserError: the processes do not divide a step, or the size set does not divide a process's share of it.
        """
        if self.windows_per_step % n_processes:
            fewer = max(count for count in range(1, n_processes) if self.windows_per_step % count == 0)
            raise UserError(
                f"a step of {self.windows_per_step} sequences cannot be divided equally among {n_processes} "
                f"processes: use {fewer} processes, or a --tokens_per_step that they divide"
            )
        share = self.windows_per_step // n_processes
        divisors = self.list_divisors(n_processes)
        if self.micro_batch_size == "auto":
            return [size for size in divisors if size <= largest]
        size = int(self.micro_batch_size)
        if size not in divisors:
            nearest = min(divisors, key=lambda divisor: abs(divisor - size))
            raise UserError(
                f"--micro_batch_size {size} does not divide the {share} sequences that each process takes in a step: "
                f"use {nearest}"
            )
        return [size]
