"""Settings of a training run, and the arithmetic derived from them."""

import math
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import yaml

from ..core.arguments import Config, experiment, setting
from ..core.errors import UserError
from .schedule import Schedule
from .skipping import parse_skips

# Flags of nanoGPT, llm.c and the transformers Trainer, each with its equivalent here.
FOREIGN_FLAGS = yaml.safe_load(Path(__file__).with_name("foreign_flags.yaml").read_text(encoding="utf-8"))
TRACKERS = ("wandb", "tensorboard")
SMOKE_STEPS = 10


@dataclass
class TrainingConfig(Config):
    """All settings of `train.py`. The defaults reproduce GPT-2 124M on 10 B tokens of FineWeb-Edu.

    An `experiment` field determines the weights and may not change on resume; a `setting` field may. The model's
    shape, the run's length and its data determine the weights too, but can be given in several ways:
    `start.choose_start` adds them in resolved form. A new `experiment` field needs a value for older checkpoints
    (`start.load_resumed_state`). Upper bounds catch typos early.
    """

    data_dir: str = setting(
        "data/edu_fineweb10B", "folder of token shards written by prepare_data.py", heading="data", path=True
    )
    sequence_length: int = experiment(
        1024, "tokens per sequence; also the context length of a model from scratch", above=0, most=2**24
    )
    tokens_per_step: int = experiment(524288, "tokens per optimizer update, over all devices", above=0, most=2**30)
    shuffle_windows: Literal["auto", "on", "off"] = experiment(
        "auto", "permute the order of windows; auto: except in the first epoch over a shuffled corpus"
    )
    skip_steps: list[str] = setting(
        [],
        "updates to skip because their data break the run, as inclusive ranges A:B; stored in the checkpoints",
    )

    model_size: str | None = setting(
        None,
        "model shape: 124M, 350M, 774M or 1558M; default: 124M from scratch, otherwise the shape of init_from",
        heading="model",
    )
    n_layer: int | None = setting(None, "transformer blocks; overrides model_size", least=1, most=1000)
    n_head: int | None = setting(None, "attention heads; overrides model_size", least=1, most=2**17)
    n_embd: int | None = setting(None, "hidden size; overrides model_size", least=1, most=2**17)
    init_from: str = experiment(
        "scratch",
        "scratch, or the Hub id or folder of a GPT-2-shaped model to start from (with eval_only, of any causal "
        "language model)",
        path=True,
    )
    dropout: float = experiment(
        0.0,
        "dropout probability of embeddings, attention and residuals; OpenAI used 0.1 and several epochs",
        least=0,
        below=1,
    )

    epochs: float = setting(
        1.0,
        "passes over the training tokens, may be fractional; max_steps takes precedence",
        heading="schedule and optimizer",
        above=0,
        most=10**6,
    )
    max_steps: int | None = setting(None, "optimizer updates; default: derived from epochs", least=1, most=10**12)
    learning_rate: float = experiment(6e-4, "peak learning rate (GPT-3 paper, table 2.1)", above=0, below=math.inf)
    min_lr_ratio: float = experiment(0.1, "final learning rate as a fraction of the peak", least=0, below=math.inf)
    warmup_tokens: int = experiment(375_000_000, "tokens of linear warm-up (GPT-3 paper, appendix B)", least=0)
    lr_schedule: Literal["cosine", "wsd", "constant"] = experiment("cosine", "schedule after the warm-up")
    weight_decay: float = experiment(
        0.1, "AdamW's weight decay, for tensors with two or more dimensions", least=0, below=math.inf
    )
    beta1: float = experiment(0.9, "AdamW's decay rate of the gradient mean", least=0, below=1)
    beta2: float = experiment(0.95, "AdamW's decay rate of the squared-gradient mean", least=0, below=1)
    grad_clip: float = experiment(1.0, "maximum global gradient norm; inf: no clipping", above=0)
    seed: int = experiment(1337, "seed of initial weights, window order, dropout and samples", least=0, below=2**63)

    micro_batch_size: str = setting(
        "auto",
        "sequences per device and micro-step; only divides the work, except under dropout; auto: the largest size "
        "estimated to fit, at most 64 (fewer on a CPU), reduced while memory runs out before the first step; kept on "
        "resume",
        heading="device",
        private=True,
    )
    mixed_precision: Literal["bf16", "fp16", "no"] = experiment(
        "bf16", "autocast precision; a device without bf16 falls back to float32 with a notice"
    )
    tf32: bool = experiment(
        True, "use TF32 for float32 matrix products where the device supports it; False: full precision, slower"
    )
    compile: Literal["auto", "on", "off"] = setting(
        "auto", "torch.compile the training step; auto: if a working compiler for the device is found"
    )
    deterministic: bool = setting(
        False,
        "on a GPU, use deterministic operations only: a run resumed on the same GPUs ends with the same bits; slower. "
        "On a CPU this is always on",
    )
    loss_chunk_tokens: int | None = setting(
        None,
        "tokens per chunk of logits in the loss; affects speed and memory only; default: 1024 on a CPU, 8192 on CUDA",
        least=1,
    )
    gradient_checkpointing: bool = setting(False, "recompute activations in the backward pass; less memory, slower")

    eval_every: int = setting(250, "steps between validations; 0: never", heading="evaluation", least=0)
    eval_tokens: int = setting(10_485_760, "validation tokens, from the start of the split; the same on any hardware")
    hellaswag_every: int = setting(250, "steps between HellaSwag scores; 0: never", least=0)
    hellaswag_file: str | None = setting(
        None, "HellaSwag items as .jsonl or .parquet; default: the validation set on the Hub", path=True
    )
    hellaswag_limit: int | None = setting(None, "score only the first N items; default: all", least=1)
    sample_every: int = setting(250, "steps between samples; 0: never", least=0)
    sample_prompt: str = setting("Hello, I'm a language model,", "prompt of the samples")
    sample_tokens: int = setting(32, "tokens per sample, prompt included", above=0)
    eval_only: bool = setting(
        False,
        "do not train: print the validation loss (unless eval_every is 0) and HellaSwag score (unless hellaswag_every "
        "is 0) of init_from, which must have the data's tokenizer, and store them in data_dir/baselines.json",
    )

    output_dir: str = setting("runs", "folder of all runs", heading="run and checkpoints", path=True, private=True)
    run_name: str = setting("gpt2_124M", "name of this run; its folder is output_dir/run_name")
    save_every: int = setting(1000, "steps between checkpoints, and one at the end; 0: never", least=0)
    keep_checkpoints: int = setting(2, "number of newest checkpoints to keep; 0: all", least=0)
    keep_weights_every: int = setting(
        0,
        "steps between models to keep permanently, without optimizer state; a multiple of save_every; 0: none",
        least=0,
    )
    save_best: bool = setting(False, "keep the model with the lowest validation loss in best/")
    resume_from_checkpoint: str = setting(
        "auto",
        "auto: the newest checkpoint in the run folder, if any; never: start over and replace the run folder; or the "
        "path of a checkpoint, which may belong to another run as long as this run has no newer one",
        aliases=["--resume"],
        path=True,
        private=True,
    )

    report_to: str = setting(
        "auto",
        "trackers: wandb, tensorboard, or both separated by a comma; none; auto: wandb if it has a key, else none",
        heading="tracking",
        private=True,
    )
    wandb_project: str = setting("gpt2-repro", "wandb project", private=True)

    push_to_hub: bool = setting(
        False,
        "upload the finished model to the Hugging Face Hub, and while training the model of every checkpoint, tagged "
        "like step-0000250; needs a token from `hf auth login` or HF_TOKEN",
        heading="publishing",
        private=True,
    )
    hub_model_id: str | None = setting(
        None, "the repository, as user/name or name; default: run_name in your namespace", private=True
    )
    hub_public: bool = setting(False, "make the repository public; by default a new one is private", private=True)

    plan: bool = setting(
        False,
        "print parameters, steps, FLOPs, disk use and hours, and exit; needs no device",
        heading="before you run",
    )
    plan_tokens_per_second: float | None = setting(
        None,
        "throughput of all devices together for the hours of --plan; default: a few examples",
        least=1,
        below=math.inf,
    )
    smoke: bool = setting(
        False,
        f"smoke test: {SMOKE_STEPS} real steps, one evaluation, a checkpoint saved and reloaded; print measured "
        "tokens/s, peak memory and projected hours, and leave nothing behind",
    )
    yes: bool = setting(False, "allow CPU runs that are projected to exceed a week", private=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_evaluation()
        self._check_batch()
        self.skips  # noqa: B018  validates them
        if self.save_every and self.keep_weights_every % self.save_every:
            more = self.keep_weights_every // self.save_every * self.save_every + self.save_every
            raise UserError(
                f"--keep_weights_every {self.keep_weights_every:,} is not a multiple of --save_every "
                f"{self.save_every:,}, and only saved models can be kept: use {more:,}, or another --save_every"
            )
        if self.report_to not in ("auto", "none") and not set(self.report_to.split(",")) <= set(TRACKERS):
            raise UserError(
                f"--report_to {self.report_to!r}: must be auto, none, or one or more of {', '.join(TRACKERS)} "
                "separated by commas without spaces"
            )
        if "/" in self.run_name or self.run_name in ("", ".", ".."):
            raise UserError(f"--run_name {self.run_name!r} must be a folder name without slashes (see --output_dir)")

    def _check_evaluation(self) -> None:
        if self.eval_every and self.eval_tokens < self.sequence_length:
            raise UserError(
                f"--eval_tokens {self.eval_tokens:,} must be at least --sequence_length {self.sequence_length:,}"
            )
        if self.eval_only and self.init_from == "scratch":
            raise UserError("--eval_only needs a model: set --init_from to a Hub id, such as gpt2, or a folder")
        if self.eval_only and not self.eval_every and not self.hellaswag_every:
            raise UserError("--eval_only has nothing to evaluate: --eval_every and --hellaswag_every are both 0")

    def _check_batch(self) -> None:
        if not self.eval_only and self.tokens_per_step % self.sequence_length:
            lower = self.tokens_per_step // self.sequence_length * self.sequence_length
            raise UserError(
                f"--tokens_per_step {self.tokens_per_step:,} is not a multiple of --sequence_length "
                f"{self.sequence_length:,}: use {lower or self.sequence_length:,}"
            )
        if self.micro_batch_size != "auto" and not re.fullmatch(r"0{0,9}[1-9][0-9]{0,9}", self.micro_batch_size):
            raise UserError(f"--micro_batch_size must be auto or at least 1, not {self.micro_batch_size}")

    @property
    def skips(self) -> list[range]:
        """Ranges of updates to skip, parsed from `skip_steps`."""
        return parse_skips(self.skip_steps)

    def as_smoke_test(self) -> "TrainingConfig":
        """Return the settings of a smoke test, which uses a run folder of its own and no tracker."""
        return replace(
            self,
            run_name=f"{self.run_name}-smoke-{os.getpid()}",
            resume_from_checkpoint="never",
            report_to="none",
            push_to_hub=False,
            save_every=self.save_every or SMOKE_STEPS,
            keep_weights_every=0,
        )

    @property
    def windows_per_step(self) -> int:
        """Sequences per optimizer update, over all devices."""
        return self.tokens_per_step // self.sequence_length

    @property
    def warmup_steps(self) -> int:
        """Updates of linear warm-up: 715 with the GPT-3 paper's 375 M tokens at 524,288 tokens per step."""
        return self.warmup_tokens // self.tokens_per_step

    def build_schedule(self, max_steps: int) -> Schedule:
        """Return the learning-rate schedule of a run of `max_steps` updates."""
        return Schedule(self.lr_schedule, self.learning_rate, self.min_lr_ratio, self.warmup_steps, max_steps)

    def first_permuted_epoch(self, is_shuffled: bool) -> int | None:
        """Return the first epoch whose windows are permuted, or `None` for none.

        Args:
            is_shuffled: whether the corpus itself is shuffled; `auto` then reads the first epoch in order.
        """
        return {"auto": 1 if is_shuffled else 0, "on": 0, "off": None}[self.shuffle_windows]

    def derive_max_steps(self, n_windows: int) -> int:
        """Return the number of updates: `max_steps`, or the full ones in `epochs` passes over `n_windows` windows.

        Raises:
            UserError: the windows do not fill one update.
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
        """Return all micro-batch sizes that divide a process's share of a step, largest first."""
        share = self.windows_per_step // n_processes
        small = [size for size in range(1, math.isqrt(share) + 1) if share % size == 0]
        return sorted({*small, *(share // size for size in small)}, reverse=True)

    def list_micro_batch_sizes(self, n_processes: int, largest: int) -> list[int]:
        """Return the micro-batch sizes to try, largest first: the one set, or for `auto` all divisors up to `largest`.

        Raises:
            UserError: a step cannot be divided among the processes, or the size set does not divide a process's share.
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
