"""The settings of a training run, and the arithmetic that follows from them."""

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

# Flags of nanoGPT, llm.c and the transformers Trainer, each with what takes its place here.
FOREIGN_FLAGS = yaml.safe_load(Path(__file__).with_name("foreign_flags.yaml").read_text(encoding="utf-8"))
TRACKERS = ("wandb", "tensorboard")
SMOKE_STEPS = 10


@dataclass
class TrainingConfig(Config):
    """Every knob of `train.py`. The defaults reproduce GPT-2 124M on 10 B tokens of FineWeb-Edu.

    Upper bounds catch typing errors before the machine has to. An `experiment` decides the weights and may not change
    when a run is resumed; a `setting` may. The shape of the model, the length of the run and what its data are decide
    the weights too, but may be given in several ways: `start.choose_start` adds them, resolved. A new `experiment`
    needs a value for the checkpoints that are older than it (`start.load_resumed_state`).
    """

    data_dir: str = setting(
        "data/edu_fineweb10B", "folder of token shards, as prepare_data.py writes it", heading="data", path=True
    )
    sequence_length: int = experiment(
        1024, "tokens in a sequence; also the positions of a model from scratch", above=0, most=2**24
    )
    tokens_per_step: int = experiment(
        524288, "tokens in an optimizer update, all devices together", above=0, most=2**30
    )
    shuffle_windows: Literal["auto", "on", "off"] = experiment(
        "auto", "order of windows; auto: permuted, except in the first epoch over a corpus that is shuffled already"
    )
    skip_steps: list[str] = setting(
        [],
        "updates to pass over because their data break the run, as A:B, both included; several may be given; kept in "
        "the checkpoints",
    )

    model_size: str | None = setting(
        None,
        "shape of the model: 124M, 350M, 774M or 1558M; not given: 124M from scratch, else init_from's own",
        heading="model",
    )
    n_layer: int | None = setting(None, "transformer blocks, in place of model_size's", least=1, most=1000)
    n_head: int | None = setting(None, "attention heads, in place of model_size's", least=1, most=2**17)
    n_embd: int | None = setting(None, "width, in place of model_size's", least=1, most=2**17)
    init_from: str = experiment(
        "scratch",
        "scratch, or a GPT-2-shaped model to start from (with eval_only any causal language model): a Hub id or a "
        "folder",
        path=True,
    )
    dropout: float = experiment(
        0.0,
        "probability, at embeddings, attention and residuals; OpenAI trained with 0.1 and several epochs",
        least=0,
        below=1,
    )

    epochs: float = setting(
        1.0,
        "passes over the training tokens, fractions allowed; max_steps wins over it",
        heading="schedule and optimizer",
        above=0,
        most=10**6,
    )
    max_steps: int | None = setting(
        None, "optimizer updates; derived from epochs where not given", least=1, most=10**12
    )
    learning_rate: float = experiment(6e-4, "peak learning rate (GPT-3 paper, table 2.1)", above=0, below=math.inf)
    min_lr_ratio: float = experiment(0.1, "last learning rate, as a fraction of the peak", least=0, below=math.inf)
    warmup_tokens: int = experiment(375_000_000, "tokens of linear warm-up (GPT-3 paper, appendix B)", least=0)
    lr_schedule: Literal["cosine", "wsd", "constant"] = experiment("cosine", "what follows the warm-up")
    weight_decay: float = experiment(
        0.1, "AdamW's decay of every tensor of two or more dimensions", least=0, below=math.inf
    )
    beta1: float = experiment(0.9, "AdamW's decay of the gradient mean", least=0, below=1)
    beta2: float = experiment(0.95, "AdamW's decay of the squared-gradient mean", least=0, below=1)
    grad_clip: float = experiment(1.0, "largest global gradient norm; inf: gradients are not clipped", above=0)
    seed: int = experiment(1337, "of the initial weights, the window order and the samples", least=0, below=2**63)

    micro_batch_size: str = setting(
        "auto",
        "sequences a device takes at once; never changes the experiment; auto: what is calculated to fit, 64 at most "
        "(fewer on a CPU), less while memory runs out before the first step; a resumed run keeps it",
        heading="device",
        private=True,
    )
    mixed_precision: Literal["bf16", "fp16", "no"] = experiment(
        "bf16", "autocast; where the device has no bf16 the run uses float32 and says so"
    )
    tf32: bool = experiment(
        True, "compute what stays in float32 as TF32 where the device has it; False: exactly, slower"
    )
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
        least=1,
    )
    gradient_checkpointing: bool = setting(False, "recompute activations in the backward pass: less memory, slower")

    eval_every: int = setting(250, "steps between validations; 0: never", heading="evaluation", least=0)
    eval_tokens: int = setting(10_485_760, "validation tokens, from the front of the split; the same on any hardware")
    hellaswag_every: int = setting(250, "steps between HellaSwag scores; 0: never", least=0)
    hellaswag_file: str | None = setting(
        None, "HellaSwag items as .jsonl or .parquet; not given: the Hub's validation set", path=True
    )
    hellaswag_limit: int | None = setting(None, "score the first items only; not given: all", least=1)
    sample_every: int = setting(250, "steps between samples; 0: never", least=0)
    sample_prompt: str = setting("Hello, I'm a language model,", "text that the samples continue")
    sample_tokens: int = setting(32, "tokens of a sample, the prompt's included", above=0)
    eval_only: bool = setting(
        False,
        "train nothing: print validation loss (unless eval_every is 0) and HellaSwag (unless hellaswag_every is 0) of "
        "init_from, whose tokenizer has to be the data's, and keep them in data_dir/baselines.json",
    )

    output_dir: str = setting("runs", "folder of all runs", heading="run and checkpoints", path=True, private=True)
    run_name: str = setting("gpt2_124M", "name of this run; its folder is output_dir/run_name")
    save_every: int = setting(1000, "steps between checkpoints, and one at the end; 0: never", least=0)
    keep_checkpoints: int = setting(2, "newest checkpoints to keep; 0: all", least=0)
    keep_weights_every: int = setting(
        0,
        "steps between checkpoints whose model is kept permanently, later without the optimizer's state; a multiple "
        "of save_every; 0: none",
        least=0,
    )
    save_best: bool = setting(False, "keep the model of the lowest validation loss in best/")
    resume_from_checkpoint: str = setting(
        "auto",
        "auto: the newest checkpoint of the run folder, if any; never: replace what is in the run folder; or a path, "
        "which may be of another run's checkpoint until this run has a newer one",
        aliases=["--resume"],
        path=True,
        private=True,
    )

    report_to: str = setting(
        "auto",
        "trackers: wandb, tensorboard, or both with a comma between; auto: wandb if a key is present, else none",
        heading="tracking",
        private=True,
    )
    wandb_project: str = setting("gpt2-repro", "wandb project", private=True)

    push_to_hub: bool = setting(
        False,
        "upload the finished model to the Hugging Face Hub, and every checkpoint's model, tagged step-0000250 or the "
        "like, beside the training; the token is that of `hf auth login` or HF_TOKEN",
        heading="publishing",
        private=True,
    )
    hub_model_id: str | None = setting(
        None, "the repository, as user/name or a name of yours; not given: run_name in your namespace", private=True
    )
    hub_public: bool = setting(
        False, "let everybody see the repository; not given: a new one is private", private=True
    )

    plan: bool = setting(
        False,
        "print the arithmetic of the run and exit: nothing is computed, no device is needed",
        heading="before you run",
    )
    plan_tokens_per_second: float | None = setting(
        None,
        "rate, of all devices together, at which --plan counts the hours; not given: a few examples",
        least=1,
        below=math.inf,
    )
    smoke: bool = setting(
        False,
        f"try the run out: {SMOKE_STEPS} real steps, one evaluation, a checkpoint saved and loaded again; then print "
        "measured tokens/s, peak memory and hours, and leave nothing behind",
    )
    yes: bool = setting(False, "allow CPU runs that are projected to exceed a week", private=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_evaluation()
        self._check_batch()
        self.skips  # noqa: B018  reads them
        if self.save_every and self.keep_weights_every % self.save_every:
            more = self.keep_weights_every // self.save_every * self.save_every + self.save_every
            raise UserError(
                f"--keep_weights_every {self.keep_weights_every:,} is not a multiple of --save_every "
                f"{self.save_every:,}, and only what is saved can be kept: use {more:,}, or another --save_every"
            )
        if self.report_to not in ("auto", "none") and not set(self.report_to.split(",")) <= set(TRACKERS):
            raise UserError(
                f"--report_to {self.report_to!r}: has to be auto, none, or one or more of {', '.join(TRACKERS)} with "
                "commas and no spaces between"
            )
        if "/" in self.run_name or self.run_name in ("", ".", ".."):
            raise UserError(f"--run_name {self.run_name!r} has to be a plain folder name (see --output_dir)")

    def _check_evaluation(self) -> None:
        if self.eval_every and self.eval_tokens < self.sequence_length:
            raise UserError(f"--eval_tokens ({self.eval_tokens:,}) has to be at least one --sequence_length")
        if self.eval_only and self.init_from == "scratch":
            raise UserError("--eval_only needs a model: give --init_from a Hub id, such as gpt2, or a folder")
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
            raise UserError(f"--micro_batch_size has to be auto or 1 or more, not {self.micro_batch_size}")

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

    def build_schedule(self, max_steps: int) -> Schedule:
        """Return the learning rates of a run of `max_steps` updates."""
        return Schedule(self.lr_schedule, self.learning_rate, self.min_lr_ratio, self.warmup_steps, max_steps)

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
