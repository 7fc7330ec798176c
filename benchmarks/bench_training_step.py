"""A full optimizer step of train.py and of the straightforward loop: throughput and peak memory.

    python benchmarks/bench_training_step.py [--batch_size 2] [--sequence_length 1024] [--rounds 7]

The straightforward loop is transformers' `GPT2LMHeadModel` called with `labels` under autocast, `clip_grad_norm_` and
torch's default AdamW, eager and compiled. train.py's step is built as train.py builds it. A step is forward, backward,
clipping, the update, and reading the loss. All have the same weights, tokens, hyperparameters and precision (bfloat16
where the device has it, else float32), and no dropout.

Each peer is a process of its own with the allocator settings of its loop. Its peak resident memory includes compiling
(nothing is cached), three steps and the libraries. The processes take turns, one step at a time.
"""

import argparse
import multiprocessing
import os
import sys
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.nn.utils import clip_grad_norm_
from transformers import GPT2Config, GPT2LMHeadModel, logging

from benchmarks.measurements import SHAPES, Report, build_parser, choose_dtype, time_call
from modeling_gpt2_repro import GPT2ReproConfig, GPT2ReproForCausalLM
from modeling_gpt2_repro.core.devices import measure_peak_memory, prepare_cpu_process
from modeling_gpt2_repro.core.launch import start_accelerator
from modeling_gpt2_repro.training.batch_fit import WindowLoss, fit_micro_batch
from modeling_gpt2_repro.training.config import TrainingConfig
from modeling_gpt2_repro.training.optim import build_adamw, set_learning_rate

PEERS = ("train.py", "eager loop", "compiled loop")
WARMUP_STEPS = 3
CONFIG = TrainingConfig()  # the defaults are those of the full run
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def draw_weights(model: torch.nn.Module) -> None:
    """Draw the same weights for every class with GPT-2's parameters."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.02)


def draw_windows(options: argparse.Namespace) -> torch.Tensor:
    """Return random token ids, int64 of shape `(batch_size, sequence_length + 1)`."""
    size = (options.batch_size, options.sequence_length + 1)
    return torch.randint(0, 50257, size, generator=torch.Generator().manual_seed(1))


class StockLoop:
    """The straightforward loop over `GPT2LMHeadModel`."""

    def __init__(self, options: argparse.Namespace, compiles: bool):
        shape = SHAPES[options.model_size] | {"n_positions": max(1024, options.sequence_length)}
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = GPT2LMHeadModel(GPT2Config(**shape, **NO_DROPOUT)).to(self.device).train()
        draw_weights(self.model)
        self.forward = torch.compile(self.model) if compiles else self.model
        # There are only T positions, so each window has one target fewer than in `OurLoop`.
        self.inputs = draw_windows(options)[:, :-1].contiguous().to(self.device)
        matrices = [p for p in self.model.parameters() if p.dim() >= 2]
        vectors = [p for p in self.model.parameters() if p.dim() < 2]
        groups = [
            {"params": matrices, "weight_decay": CONFIG.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=CONFIG.learning_rate, betas=(CONFIG.beta1, CONFIG.beta2))

    def step(self) -> float:
        """Make an update, and return the loss before it."""
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=choose_dtype() == "bfloat16"):
            loss = self.forward(self.inputs, labels=self.inputs).loss
        loss.backward()
        clip_grad_norm_(self.model.parameters(), CONFIG.grad_clip)
        self.optimizer.step()
        return loss.item()


class OurLoop:
    """train.py between reading a batch and logging the metrics."""

    def __init__(self, options: argparse.Namespace, compiles: str = CONFIG.compile):
        prepare_cpu_process()
        self.accelerator = start_accelerator(CONFIG.mixed_precision, tf32=CONFIG.tf32)
        self.device = self.accelerator.device
        shape = SHAPES[options.model_size] | {"n_positions": max(1024, options.sequence_length)}
        self.model = GPT2ReproForCausalLM(GPT2ReproConfig(**shape)).to(self.device).train()
        draw_weights(self.model)
        self.optimizer = build_adamw(
            self.model, CONFIG.learning_rate, CONFIG.weight_decay, (CONFIG.beta1, CONFIG.beta2)
        )
        self.windows = draw_windows(options)
        sizes = [options.batch_size]
        fit = fit_micro_batch(
            WindowLoss(self.model), self.windows, sizes, compiles, self.accelerator, lambda line: None
        )
        self.windows = self.windows.to(self.device)
        self.loss_model, self.optimizer = self.accelerator.prepare(fit.loss_model, self.optimizer)

    def step(self) -> float:
        """Make an update, and return the loss before it."""
        set_learning_rate(self.optimizer, CONFIG.learning_rate)
        loss = self.loss_model(self.windows)
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.model.parameters(), CONFIG.grad_clip).item()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return self.accelerator.reduce(loss.detach(), reduction="mean").item()


def serve(name: str, options: argparse.Namespace, connection: Connection) -> None:
    """Build a peer, send losses and peak memory of its first steps, then the seconds of a step for each request."""
    logging.set_verbosity_error()
    loop = OurLoop(options) if name == "train.py" else StockLoop(options, compiles=name == "compiled loop")
    losses = [loop.step() for _ in range(WARMUP_STEPS)]
    connection.send((losses, measure_peak_memory(loop.device)))
    while connection.recv():
        connection.send(time_call(loop.step))


def measure(options: argparse.Namespace) -> tuple[dict, dict, dict]:
    """Return the first losses, the peak memory in GB and the seconds of each measured step, by peer."""
    context = multiprocessing.get_context("spawn")
    connections, losses, memory = {}, {}, {}
    for name in options.peers:
        connections[name], theirs = context.Pipe()
        context.Process(target=serve, args=(name, options, theirs), daemon=True).start()
        theirs.close()  # or the death of a peer would not end its connection
        losses[name], memory[name] = connections[name].recv()
    seconds: dict[str, list[float]] = {name: [] for name in options.peers}
    for _ in range(options.rounds):
        for name, connection in connections.items():
            connection.send(True)
            seconds[name].append(connection.recv())
    for connection in connections.values():
        connection.send(False)
    return losses, memory, seconds


def main(argv: list[str] | None = None) -> None:
    parser = build_parser(__doc__, "training_step")
    parser.add_argument("--model_size", default="124M", choices=SHAPES)
    parser.add_argument("--batch_size", type=int, default=2, help="sequences per step")
    parser.add_argument("--sequence_length", type=int, default=1024, help="tokens")
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=PEERS)
    parser.add_argument("--rounds", type=int, default=7, help="measured steps of each peer")
    options = parser.parse_args(argv)
    report = Report("training_step", options)

    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        losses, memory, seconds = measure(options)
    n_tokens = options.batch_size * options.sequence_length
    part = f"{options.model_size}, {options.batch_size} x {options.sequence_length} tokens, {choose_dtype()}"
    for name in options.peers:
        report.add_median(part, name, [n_tokens / each for each in seconds[name]], "tokens/s")
        report.add(part, name, memory[name], "GB at peak", statistic="single run")
        print(f"{name}: first losses {' '.join(f'{loss:.3f}' for loss in losses[name])}")
    report.compare(part, *PEERS)
    report.write(options.output)


if __name__ == "__main__":
    main()
