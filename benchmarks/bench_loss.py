"""Ways to compute the vocabulary head and its cross-entropy, forward and backward: seconds and exactness.

    python benchmarks/bench_loss.py [--tokens 2048] [--n_embd 768] [--dtype bfloat16] [--compile]

The model's default comes from this table: `HeadCrossEntropy` in chunks of `LOSS_CHUNK_TOKENS`. The peers are plain
cross-entropy on float32 logits, as transformers computes it, the same with the vocabulary padded to a multiple of 128,
and torch's own `linear_cross_entropy` in chunks. They take turns; medians. The error is that of the weight's gradient,
relative to float64.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.nn import LinearCrossEntropyOptions
from torch.nn.functional import cross_entropy, linear_cross_entropy, pad

from modeling_gpt2_repro.core.devices import prepare_cpu_process
from modeling_gpt2_repro.modeling_gpt2_repro import HeadCrossEntropy

VOCAB_SIZE = 50257


def plain(states: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return cross_entropy((states @ weight.t()).float(), targets)


def plain_padded(states: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logits = states @ pad(weight, (0, 0, 0, -VOCAB_SIZE % 128)).t()
    return cross_entropy(logits[:, :VOCAB_SIZE].float(), targets)


def torch_chunked(states: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return linear_cross_entropy(states, weight, targets, options=LinearCrossEntropyOptions())


def torch_chunks_of_512(states: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    options = LinearCrossEntropyOptions(chunking_method=None, batch_chunk_size=512)
    return linear_cross_entropy(states, weight, targets, options=options)


def build_ours(chunk_tokens: int):
    """Return our loss with chunks of that many positions."""

    def ours(states: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return HeadCrossEntropy.apply(states, weight, targets, chunk_tokens) / len(targets)

    return ours


def main() -> None:
    """Print seconds and gradient error of each way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--n_embd", type=int, default=768)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    prepare_cpu_process()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, options.dtype)

    torch.manual_seed(0)
    states = torch.randn(options.tokens, options.n_embd, device=device).requires_grad_()
    weight = (0.02 * torch.randn(VOCAB_SIZE, options.n_embd, device=device)).requires_grad_()
    targets = torch.randint(0, VOCAB_SIZE, (options.tokens,), device=device)
    (exact,) = torch.autograd.grad(plain(states.double(), weight.double(), targets), weight)

    ways = {"plain": plain, "plain, padded": plain_padded, "torch, auto": torch_chunked}
    ways["torch, 512"] = torch_chunks_of_512
    ways |= {f"ours, {chunk}": build_ours(chunk) for chunk in (256, 512, 1024, 2048, 8192) if chunk <= options.tokens}
    if options.compile:
        ways = {name: torch.compile(way) for name, way in ways.items()}

    def run(way) -> tuple[float, torch.Tensor]:
        start = time.perf_counter()
        # The casts are part of it: a model's master weights are float32.
        loss = way(states.to(dtype), weight.to(dtype), targets)
        (_, gradient) = torch.autograd.grad(loss, (states, weight))
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start, gradient

    errors = {name: ((run(way)[1] - exact).norm() / exact.norm()).item() for name, way in ways.items()}
    seconds = {name: [] for name in ways}
    for _ in range(options.rounds):
        for name, way in ways.items():
            seconds[name].append(run(way)[0])
    mode = "compiled" if options.compile else "eager"
    print(f"{options.tokens} tokens, width {options.n_embd}, {options.dtype}, {mode}")
    for name in ways:
        print(f"{name:14} {statistics.median(seconds[name]):7.3f} s   gradient error {errors[name]:.1e}")


if __name__ == "__main__":
    main()
