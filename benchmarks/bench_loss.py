"""Implementations of the vocabulary head and its cross-entropy, forward and backward: time and exactness.

    python benchmarks/bench_loss.py [--tokens 2048] [--n_embd 768] [--dtype bfloat16] [--compile]

The model's default, `HeadCrossEntropy` in chunks of `LOSS_CHUNK_TOKENS`, was chosen from this table. The peers are
plain cross-entropy on float32 logits, as transformers computes it, the same with the vocabulary padded to a multiple
of 128, and torch's own `linear_cross_entropy` in chunks. They take turns. The error is that of the weight's gradient,
relative to float64.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.nn import LinearCrossEntropyOptions
from torch.nn.functional import cross_entropy, linear_cross_entropy, pad

from benchmarks.measurements import Report, build_parser, choose_dtype
from modeling_gpt2_repro.core.devices import prepare_cpu_process
from modeling_gpt2_repro.modeling_gpt2_repro import HeadCrossEntropy

VOCAB_SIZE = 50257
CHUNKS = (256, 512, 1024, 2048, 8192)
Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


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


def build_head_loss(chunk_tokens: int) -> Loss:
    """Return this package's loss with chunks of that many positions."""

    def head_loss(states: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return HeadCrossEntropy.apply(states, weight, targets, chunk_tokens) / len(targets)

    return head_loss


def list_losses(n_tokens: int) -> dict[str, Loss]:
    """Return the implementations by name."""
    return {
        "plain": plain,
        "plain, padded": plain_padded,
        "linear_cross_entropy": torch_chunked,
        "linear_cross_entropy, chunks of 512": torch_chunks_of_512,
        **{f"HeadCrossEntropy, chunks of {size:,}": build_head_loss(size) for size in CHUNKS if size <= n_tokens},
    }


def main(argv: list[str] | None = None) -> None:
    parser = build_parser(__doc__, "loss")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--n_embd", type=int, default=768)
    parser.add_argument("--dtype", default=choose_dtype(), choices=["bfloat16", "float32"])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args(argv)
    report = Report("loss", options)
    prepare_cpu_process()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, options.dtype)

    torch.manual_seed(0)
    states = torch.randn(options.tokens, options.n_embd, device=device).requires_grad_()
    weight = (0.02 * torch.randn(VOCAB_SIZE, options.n_embd, device=device)).requires_grad_()
    targets = torch.randint(0, VOCAB_SIZE, (options.tokens,), device=device)
    (exact,) = torch.autograd.grad(plain(states.double(), weight.double(), targets), weight)
    losses = list_losses(options.tokens)
    if options.compile:
        losses = {name: torch.compile(loss) for name, loss in losses.items()}

    def run(loss: Loss) -> tuple[float, torch.Tensor]:
        start = time.perf_counter()
        # The casts are timed too: a model's master weights are float32.
        value = loss(states.to(dtype), weight.to(dtype), targets)
        (_, gradient) = torch.autograd.grad(value, (states, weight))
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start, gradient

    errors = {name: ((run(loss)[1] - exact).norm() / exact.norm()).item() for name, loss in losses.items()}
    seconds: dict[str, list[float]] = {name: [] for name in losses}
    for _ in range(options.rounds):
        for name, loss in losses.items():
            seconds[name].append(run(loss)[0])
    mode = "compiled" if options.compile else "eager"
    part = f"{options.tokens:,} tokens, width {options.n_embd}, {options.dtype}, {mode}"
    for name in losses:
        report.add_median(part, name, seconds[name], "s")
        if name.startswith("HeadCrossEntropy"):
            report.compare(part, name, "plain", "linear_cross_entropy")
    for name in losses:
        report.add(part, name, errors[name], "relative error of the gradient")
    report.write(options.output)


if __name__ == "__main__":
    main()
