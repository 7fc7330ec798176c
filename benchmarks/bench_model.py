"""Forward and backward of our GPT-2 beside transformers' own, eager and compiled: tokens a second and peak memory.

    python benchmarks/bench_model.py [--model_size 124M] [--batch_size 2] [--sequence_length 1024] [--dtype bfloat16]

Both start from the same weights and see the same tokens under autocast, take turns, and the medians are compared;
`GPT2LMHeadModel` is called as its documentation says, with `labels`. Neither has dropout. Peak memory is of a fresh
process that makes three steps of one model: all of it, libraries and weights included.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from modeling_gpt2_repro import MODEL_SIZES, GPT2ReproConfig, GPT2ReproForCausalLM
from modeling_gpt2_repro.core.devices import measure_peak_memory, prepare_cpu_process

NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
CLASSES = {"ours": (GPT2ReproForCausalLM, GPT2ReproConfig), "stock": (GPT2LMHeadModel, GPT2Config)}


class Peer:
    """One model in training, eager or compiled."""

    def __init__(self, name: str, options: argparse.Namespace):
        model_class, config_class = CLASSES[name]
        torch.manual_seed(0)
        shape = MODEL_SIZES[options.model_size] | {"n_positions": max(1024, options.sequence_length)}
        self.is_ours = name == "ours"
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = getattr(torch, options.dtype)
        self.model = model_class(config_class(**shape, **NO_DROPOUT)).to(self.device).train()
        self.forward = torch.compile(self.model) if options.compile else self.model
        generator = torch.Generator().manual_seed(1)
        size = (options.batch_size, options.sequence_length + 1)
        self.windows = torch.randint(0, 50257, size, generator=generator).to(self.device)

    def step(self) -> float:
        """Compute a loss and its gradients; return the seconds that took."""
        inputs = self.windows[:, :-1].contiguous()
        targets = {"shift_labels": self.windows[:, 1:].contiguous()} if self.is_ours else {"labels": inputs}
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


def main() -> None:
    """Print a table for eager and for compiled training, with the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_size", default="124M", choices=MODEL_SIZES)
    parser.add_argument("--batch_size", type=int, default=2, help="sequences at once")
    parser.add_argument("--sequence_length", type=int, default=1024, help="tokens")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--memory_of", choices=CLASSES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    prepare_cpu_process()
    if options.memory_of:
        peer = Peer(options.memory_of, options)
        for _ in range(3):
            peer.step()
        print(measure_peak_memory(peer.device))
        return

    n_tokens = options.batch_size * options.sequence_length
    print(f"{options.model_size}, {options.batch_size} x {options.sequence_length} tokens, {options.dtype}")
    memory = {}  # measured first, because Linux counts a parent's resident memory as its child's peak
    for options.compile in (False, True):
        memory[options.compile] = {name: measure_memory(name, options) for name in CLASSES}
    for options.compile in (False, True):
        peers = {name: Peer(name, options) for name in CLASSES}
        for peer in peers.values():
            peer.step()  # compiles, and allocates
        seconds = {name: [] for name in peers}
        for _ in range(options.rounds):
            for name, peer in peers.items():
                seconds[name].append(peer.step())
        rate = {name: n_tokens / statistics.median(times) for name, times in seconds.items()}
        mode = "compiled" if options.compile else "eager"
        for name in peers:
            print(f"{mode:10} {name:6} {rate[name]:10,.0f} tokens/s {memory[options.compile][name]:6.2f} GB")
        speed, space = (row["ours"] / row["stock"] for row in (rate, memory[options.compile]))
        print(f"{mode:10} {'ratio':6} {speed:10.2f}          {space:6.2f}", flush=True)
        del peers, peer


if __name__ == "__main__":
    main()
