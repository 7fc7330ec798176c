"""Forward and backward of this package's GPT-2 and of transformers', eager and compiled: throughput and peak memory.

    python benchmarks/bench_model.py [--model_size 124M] [--batch_size 2] [--sequence_length 1024] [--dtype bfloat16]

Both have the same weights and tokens, run under autocast and take turns. `GPT2LMHeadModel` is called as its
documentation shows, with `labels`. Neither has dropout. Peak memory is that of a fresh process that makes three steps
of one model, libraries and weights included.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.measurements import SHAPES, Report, build_parser, choose_dtype
from modeling_gpt2_repro import GPT2ReproConfig, GPT2ReproForCausalLM
from modeling_gpt2_repro.core.devices import measure_peak_memory, prepare_cpu_process

NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
CLASSES = {
    "GPT2ReproForCausalLM": (GPT2ReproForCausalLM, GPT2ReproConfig),
    "GPT2LMHeadModel": (GPT2LMHeadModel, GPT2Config),
}


class Peer:
    """One model in training, eager or compiled."""

    def __init__(self, name: str, options: argparse.Namespace):
        model_class, config_class = CLASSES[name]
        torch.manual_seed(0)
        shape = SHAPES[options.model_size] | {"n_positions": max(1024, options.sequence_length)}
        self.takes_shift_labels = model_class is GPT2ReproForCausalLM
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = getattr(torch, options.dtype)
        self.model = model_class(config_class(**shape, **NO_DROPOUT)).to(self.device).train()
        self.forward = torch.compile(self.model) if options.compile else self.model
        generator = torch.Generator().manual_seed(1)
        size = (options.batch_size, options.sequence_length + 1)
        self.windows = torch.randint(0, 50257, size, generator=generator).to(self.device)

    def step(self) -> float:
        """Compute a loss and its gradients, and return the seconds."""
        inputs = self.windows[:, :-1].contiguous()
        targets = {"shift_labels": self.windows[:, 1:].contiguous()} if self.takes_shift_labels else {"labels": inputs}
        self.model.zero_grad(set_to_none=True)
        start = time.perf_counter()
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            loss = self.forward(inputs, use_cache=False, **targets).loss
        loss.backward()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start


def measure_memory(name: str, options: argparse.Namespace) -> float:
    """Return the peak memory in GB of a process that makes three steps."""
    flags = [f"--{key}={getattr(options, key)}" for key in ("model_size", "batch_size", "sequence_length", "dtype")]
    command = [sys.executable, __file__, f"--memory_of={name}", *flags, *(["--compile"] if options.compile else [])]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(result.stdout.splitlines()[-1])


def measure_mode(report: Report, options: argparse.Namespace, memory: dict[str, float]) -> None:
    """Measure eager or compiled steps (`options.compile`), and report them with the peak memory in GB by class."""
    n_tokens = options.batch_size * options.sequence_length
    peers = {name: Peer(name, options) for name in CLASSES}
    for peer in peers.values():
        peer.step()  # compiles, and allocates
    rates: dict[str, list[float]] = {name: [] for name in peers}
    for _ in range(options.rounds):
        for name, peer in peers.items():
            rates[name].append(n_tokens / peer.step())
    part = "compiled" if options.compile else "eager"
    for name in peers:
        report.add_median(part, name, rates[name], "tokens/s")
        report.add(part, name, memory[name], "GB at peak", statistic="single run")
    report.compare(part, *CLASSES)


def main(argv: list[str] | None = None) -> None:
    parser = build_parser(__doc__, "model")
    parser.add_argument("--model_size", default="124M", choices=SHAPES)
    parser.add_argument("--batch_size", type=int, default=2, help="sequences per step")
    parser.add_argument("--sequence_length", type=int, default=1024, help="tokens")
    parser.add_argument("--dtype", default=choose_dtype(), choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--modes", nargs="+", default=["eager", "compiled"], choices=["eager", "compiled"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--compile", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--memory_of", choices=CLASSES, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    prepare_cpu_process()
    if options.memory_of:
        peer = Peer(options.memory_of, options)
        for _ in range(3):
            peer.step()
        print(measure_peak_memory(peer.device))
        return

    report = Report("model", options)
    for name in ("compile", "memory_of"):
        del report.settings[name]
    memory = {}  # measured first, because Linux counts a parent's resident memory as its child's peak
    for mode in options.modes:
        options.compile = mode == "compiled"
        memory[mode] = {name: measure_memory(name, options) for name in CLASSES}
    for mode in options.modes:
        options.compile = mode == "compiled"
        measure_mode(report, options, memory[mode])
    report.write(options.output)


if __name__ == "__main__":
    main()
