"""What saving and resuming cost: GPT-2 124M on a folder of the reproduction's size.

    python benchmarks/bench_checkpoint.py [--model_size 124M] [--rounds 3]

Training stands still while a checkpoint is written; on resuming its files are compared with their checksums and read.
What else resuming costs is the way to the first batch, which is timed at step 0 and at step 10,000 of a folder of ten
billion tokens (empty files of that length, which take no room on most disks). Figures are of this machine's disk.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from modeling_gpt2_repro import MODEL_SIZES, GPT2ReproConfig, GPT2ReproForCausalLM
from modeling_gpt2_repro.data.dataset import TokenDataset, prefetch
from modeling_gpt2_repro.data.order import WindowOrder
from modeling_gpt2_repro.data.tokenizer import load_tokenizer
from modeling_gpt2_repro.training.checkpoint import TrainingState, check_reload, check_whole, save_checkpoint
from modeling_gpt2_repro.training.optim import build_adamw

N_SHARDS, SHARD_TOKENS, WINDOWS_PER_STEP = 100, 100_000_000, 512


def measure(function: Callable[[], object], rounds: int) -> float:
    """Return the median seconds of a call."""
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def make_empty_shards(folder: Path) -> None:
    """Make shards of ten billion tokens, all of them id 0, as sparse files."""
    for number in range(1, N_SHARDS + 1):
        with open(folder / f"x_train_{number:06d}.npy", "wb") as stream:
            header = {"descr": "<u2", "fortran_order": False, "shape": (SHARD_TOKENS,)}
            np.lib.format.write_array_header_1_0(stream, header)
            stream.truncate(stream.tell() + 2 * SHARD_TOKENS)


def read_first_batch(folder: Path, step: int) -> None:
    """Open the folder and read the first micro-batch of an update."""
    dataset = TokenDataset(str(folder), "train", 1024, 50257)
    order = WindowOrder(len(dataset), seed=1337)
    micro_batches = order.divide_steps([step], WINDOWS_PER_STEP, n_ranks=1, rank=0, micro_batch_size=8)
    batches = prefetch(dataset, micro_batches, torch.device("cpu"))
    next(batches)
    batches.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_size", default="124M", choices=MODEL_SIZES)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    model = GPT2ReproForCausalLM(GPT2ReproConfig(**MODEL_SIZES[arguments.model_size]))
    optimizer = build_adamw(model, 6e-4, 0.1, (0.9, 0.95))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    tokenizer = load_tokenizer()
    state = TrainingState(step=10_000, tokens=0, experiment={}, skips=[], tracker_run_id="")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save = measure(lambda: save_checkpoint(folder, state, model, tokenizer, optimizer), arguments.rounds)
        checkpoint = folder / "step_0010000"
        size = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
        print(f"saving            {save:6.2f} s, in which training stands still; {size / 1e9:.2f} GB")
        print(f"checking it       {measure(lambda: check_whole(checkpoint), arguments.rounds):6.2f} s, on resuming")
        check_reload(checkpoint, model, optimizer)
        make_empty_shards(folder)
        for step in (0, 10_000):
            seconds = measure(lambda step=step: read_first_batch(folder, step), 3 * arguments.rounds)
            print(f"first batch       {1e3 * seconds:6.1f} ms after opening ten billion tokens, at step {step:,}")


if __name__ == "__main__":
    main()
