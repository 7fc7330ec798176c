"""HellaSwag throughput of this package, of lm-evaluation-harness and of a loop over single items, on the same model.

    python benchmarks/bench_hellaswag.py [--data_file FILE.jsonl] [--items 60] [--rounds 3]

The model is transformers' GPT-2 in the 124M shape with random weights. The harness runs at the best of its batch
sizes. This package runs in the peer's protocol, in float32 like the peer, and also in bfloat16 where the processor has
instructions for it. They take turns. Wall time and processor time are both measured: the latter is valid on a busy
machine, with OMP_NUM_THREADS=1. Everything from text to log-probabilities is timed, except building the harness's
requests. Also reported: the ratio of floating-point operations to rows without padding, the largest difference between
the log-probabilities, and how often bfloat16 picks the same ending. Without --data_file the items are those of
.gpu/hellaswag_val.jsonl.gz or .gpu/hellaswag_val.jsonl, or, without such a file, the package's own 48 items in
HellaSwag's format.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))  # for harness.py

import torch
from harness import HFLM, build_task, silence_harness
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.measurements import Report, build_parser, choose_dtype, find_hellaswag
from modeling_gpt2_repro.core.devices import prepare_cpu_process
from modeling_gpt2_repro.data.tokenizer import load_tokenizer
from modeling_gpt2_repro.evaluation.hellaswag import evaluate_hellaswag
from modeling_gpt2_repro.evaluation.hellaswag_data import SAMPLE_FILE, HellaSwagItem, load_hellaswag
from modeling_gpt2_repro.evaluation.hellaswag_protocols import EncodedHellaSwag, encode_hellaswag
from modeling_gpt2_repro.evaluation.multiple_choice import pick_endings

BATCH_SIZES = (1, 4, 8, 16, 32)
# Enough items to choose among the harness's batch sizes.
TRIAL_ITEMS = 12
Sums = list[list[float]]


def build_model(seed: int) -> GPT2LMHeadModel:
    """Return GPT-2 124M with random weights, large enough for its answers to vary like those of a trained model."""
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(initializer_range=0.05, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)).eval()


@torch.no_grad()
def score_one_at_a_time(model: GPT2LMHeadModel, tokenizer, items: list[HellaSwagItem]) -> Sums:
    """Score the `original` protocol in the straightforward way: four padded rows per item, and all of their logits."""
    sums = []
    for item in items:
        context_ids = tokenizer(item.ctx)["input_ids"]
        rows = [(context_ids, tokenizer(" " + ending)["input_ids"]) for ending in item.endings]
        width = max(len(context) + len(ending) for context, ending in rows)
        ids, in_ending = torch.zeros(4, width, dtype=torch.long), torch.zeros(4, width)
        for row, (context, ending) in enumerate(rows):
            ids[row, : len(context) + len(ending)] = torch.tensor(context + ending)
            in_ending[row, len(context) : len(context) + len(ending)] = 1
        logits = model(ids).logits[:, :-1]
        nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        sums.append((nll.view(4, -1) * in_ending[:, 1:]).sum(dim=1).tolist())
    return sums


def build_harness(model: GPT2LMHeadModel, tokenizer, items: list[HellaSwagItem]) -> Callable[[int], Sums]:
    """Return a function that scores the harness's requests for these items at a batch size."""
    lm = HFLM(pretrained=model, tokenizer=tokenizer)
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        file.writelines(json.dumps(vars(item)) + "\n" for item in items)
        file.flush()
        task = build_task(Path(file.name))
        task.build_all_requests()

    def score(batch_size: int) -> Sums:
        lm.batch_size_per_gpu = batch_size
        nll = [-log_likelihood for log_likelihood, _ in lm.loglikelihood(task.instances, disable_tqdm=True)]
        return [nll[start : start + 4] for start in range(0, len(nll), 4)]

    return score


def score_with_package(model: torch.nn.Module, tokenizer, items: list[HellaSwagItem], protocol: str) -> Sums:
    result = evaluate_hellaswag(model, encode_hellaswag(items, tokenizer, protocol), show_progress=False)
    return [list(item.nll) for item in result.scored_items]


def measure(function: Callable[[], Sums]) -> tuple[tuple[float, float], Sums]:
    """Return the seconds of wall time and of processor time, and the result."""
    start = time.perf_counter(), time.process_time()
    sums = function()
    return (time.perf_counter() - start[0], time.process_time() - start[1]), sums


def count_flops(encoded: EncodedHellaSwag) -> tuple[int, int]:
    """Return the operations of GPT-2 124M's products for plain rows without padding, and for shared contexts."""
    config = GPT2Config()
    head = config.vocab_size * config.n_embd
    body = 12 * config.n_layer * config.n_embd**2
    attention = 2 * config.n_layer * config.n_embd  # per pair of tokens
    plain = shared = 0
    for item in encoded.items:
        n_context = len(item.context_ids)
        for ids in item.ending_ids:
            n_read = n_context + len(ids) - 1
            plain += 2 * n_read * (body + head) + attention * n_read**2
        n_places = item.n_read - n_context + 1
        shared += 2 * item.n_read * body + 2 * n_places * head + attention * item.n_read**2
    return plain, shared


def find_batch_size(trial: Callable[[int], Sums]) -> int:
    """Return the harness's fastest batch size on the trial items, by processor time."""
    trial(1)  # warm-up
    return min(BATCH_SIZES, key=lambda size: measure(partial(trial, size))[0][1])


def build_peers(options: argparse.Namespace, tokenizer, items: list[HellaSwagItem]) -> dict[str, Callable[[], Sums]]:
    """Return the scoring functions by name; the harness runs at its best batch size."""
    model = build_model(options.seed)
    harness, trial = build_harness(model, tokenizer, items), build_harness(model, tokenizer, items[:TRIAL_ITEMS])
    batch_size = find_batch_size(trial)
    peers = {
        "this package, lm_eval": partial(score_with_package, model, tokenizer, items, "lm_eval"),
        f"lm-evaluation-harness, batch size {batch_size}": partial(harness, batch_size),
        "this package, original": partial(score_with_package, model, tokenizer, items, "original"),
        "one item at a time": partial(score_one_at_a_time, model, tokenizer, items),
    }
    if choose_dtype() == "bfloat16":
        in_bf16 = build_model(options.seed).bfloat16()
        for protocol in ("lm_eval", "original"):
            peers[f"this package, {protocol}, bf16"] = partial(score_with_package, in_bf16, tokenizer, items, protocol)
    return peers


def report_rates(report: Report, part: str, seconds: dict[str, list[tuple[float, float]]], n_items: int) -> None:
    """Report items per second, and per second of processor time, and their ratios to the peers."""
    for name, times in seconds.items():
        for unit, column in (("items/s", 0), ("items/s of processor time", 1)):
            report.add_median(part, name, [n_items / each[column] for each in times], unit)
    lm_eval, harness, original, single, *in_bf16 = seconds
    for name, peer in zip((lm_eval, original, *in_bf16), (harness, single) * 2, strict=False):
        report.compare(part, name, peer)


def report_agreement(report: Report, tokenizer, items: list[HellaSwagItem], sums: dict[str, Sums]) -> None:
    """Report by how much the sums differ, how often bfloat16 picks the same ending, and the ratio of operations."""
    lm_eval, harness, original, single, *_ = sums
    for protocol, name, peer in (("lm_eval", lm_eval, harness), ("original", original, single)):
        encoded, part = encode_hellaswag(items, tokenizer, protocol), f"protocol {protocol}"
        plain, shared = count_flops(encoded)
        report.add(part, "floating-point operations, without and with a shared context", plain / shared, "x")
        difference = (torch.tensor(sums[name]) - torch.tensor(sums[peer])).abs().max().item()
        report.add(part, "log-probabilities in float32, largest difference from the peer", difference, "nats")
        if (in_bf16 := sums.get(f"{name}, bf16")) is None:
            report.omit(part, "bf16", "the processor has no instructions for it, and emulation is slow")
            continue
        same = (pick_all(encoded, sums[name]) == pick_all(encoded, in_bf16)).double().mean(dim=0)
        for score, share in zip(("acc", "acc_norm"), same.tolist(), strict=True):
            report.add(part, f"items on which bfloat16 picks the same ending, {score}", 100 * share, "%")


def main(argv: list[str] | None = None) -> None:
    parser = build_parser(__doc__, "hellaswag")
    parser.add_argument(
        "--data_file", type=Path, default=find_hellaswag(SAMPLE_FILE), help="HellaSwag's validation items (JSON lines)"
    )
    parser.add_argument("--items", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0, help="of the items and of the weights")
    options = parser.parse_args(argv)
    prepare_cpu_process()
    silence_harness()
    report, tokenizer = Report("hellaswag", options), load_tokenizer()
    items = load_hellaswag(options.data_file)
    items = random.Random(options.seed).sample(items, min(options.items, len(items)))
    peers = build_peers(options, tokenizer, items)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in peers}
    sums: dict[str, Sums] = {}
    for _ in range(options.rounds):
        for name, peer in peers.items():
            elapsed, sums[name] = measure(peer)
            seconds[name].append(elapsed)
            print(f"{name}: {elapsed[0]:.1f} s, {elapsed[1]:.1f} s of processor time", flush=True)
    kind = "the package's own items in HellaSwag's format" if options.data_file == SAMPLE_FILE else "HellaSwag items"
    part = f"GPT-2 124M, {len(items)} {kind}, {torch.get_num_threads()} threads"
    report_rates(report, part, seconds, len(items))
    report_agreement(report, tokenizer, items, sums)
    report.write(options.output)


def pick_all(encoded: EncodedHellaSwag, sums: Sums) -> torch.Tensor:
    """Return the ending picked for each item by acc and by acc_norm, int64 of shape `(items, 2)`."""
    return torch.tensor(
        [pick_endings(nll, item.ending_lengths) for nll, item in zip(sums, encoded.items, strict=True)]
    )


if __name__ == "__main__":
    main()
