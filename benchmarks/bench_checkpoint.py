"""Save and resume time of GPT-2 124M, with a data folder of the full run's size.

    python benchmarks/bench_checkpoint.py [--model_size 124M] [--rounds 5]

Training stands still while a checkpoint is written. On resuming, its files are compared with their checksums. The time
to the first batch is measured at step 0 and at step 10,000 of a folder of ten billion tokens (sparse files, which take
no room on most disks). All of it depends on the disk.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measurements import SHAPES, Report, build_parser, time_call
from modeling_gpt2_repro import GPT2ReproConfig, GPT2ReproForCausalLM
from modeling_gpt2_repro.data.dataset import TokenDataset, prefetch
from modeling_gpt2_repro.data.order import WindowOrder
from modeling_gpt2_repro.data.tokenizer import load_tokenizer
from modeling_gpt2_repro.training.checkpoint import TrainingState, check_reload, check_whole, save_checkpoint
from modeling_gpt2_repro.training.optim import build_adamw

N_SHARDS, SHARD_TOKENS, WINDOWS_PER_STEP = 100, 100_000_000, 512


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


def main(argv: list[str] | None = None) -> None:
    parser = build_parser(__doc__, "checkpoint")
    parser.add_argument("--model_size", default="124M", choices=SHAPES)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(argv)
    report, part = Report("checkpoint", options), f"checkpoint of {options.model_size}"

    model = GPT2ReproForCausalLM(GPT2ReproConfig(**SHAPES[options.model_size]))
    optimizer = build_adamw(model, 6e-4, 0.1, (0.9, 0.95))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    tokenizer = load_tokenizer()
    state = TrainingState(step=10_000, tokens=0, experiment={}, skips=[], tracker_run_id="")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def save() -> None:
            save_checkpoint(folder, state, model, tokenizer, optimizer)

        report.add_median(
            part, "writing it (training stands still)", [time_call(save) for _ in range(options.rounds)], "s"
        )
        checkpoint = folder / "step_0010000"
        size = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
        report.add(part, "size", size / 1e9, "GB")
        seconds = [time_call(lambda: check_whole(checkpoint)) for _ in range(options.rounds)]
        report.add_median(part, "comparing it with its checksums", seconds, "s")
        check_reload(checkpoint, model, optimizer)
        make_empty_shards(folder)
        for step in (0, 10_000):
            seconds = [time_call(lambda step=step: read_first_batch(folder, step)) for _ in range(3 * options.rounds)]
            milliseconds = [1e3 * each for each in seconds]
            report.add_median("folder of ten billion tokens", f"first batch, at step {step:,}", milliseconds, "ms")
    report.write(options.output)


if __name__ == "__main__":
    main()
