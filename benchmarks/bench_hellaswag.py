"""HellaSwag items a second: ours, lm-evaluation-harness and a loop that takes one item at a time, on the same model.

    python benchmarks/bench_hellaswag.py [--data_file FILE.jsonl] [--items 200] [--rounds 3]

The model is transformers' GPT-2 of the 124M shape with random weights. In float32 the harness runs at the best of its
batch sizes, and ours in the protocol of whom it is compared with; ours runs in bfloat16 as well. They take turns, and
the medians are compared, of seconds by the clock and of seconds of the processor's: the latter hold on a machine with
other work, with OMP_NUM_THREADS=1. Everything from text to sums is timed, building the harness's requests is not. Also
printed: the ratio of floating-point operations to rows without padding, the largest difference between the sums, and
on how many items bfloat16 picks the same ending.
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
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))  # which point the harness at a local file

import torch
from harness import HFLM, build_task, silence_harness
from transformers import GPT2Config, GPT2LMHeadModel

from modeling_gpt2_repro.core.devices import prepare_cpu_process
from modeling_gpt2_repro.data.tokenizer import load_tokenizer
from modeling_gpt2_repro.evaluation.hellaswag import evaluate_hellaswag
from modeling_gpt2_repro.evaluation.hellaswag_data import HellaSwagItem, load_hellaswag
from modeling_gpt2_repro.evaluation.hellaswag_protocols import EncodedHellaSwag, encode_hellaswag
from modeling_gpt2_repro.evaluation.multiple_choice import pick_endings

REAL_FILE = Path(__file__).resolve().parents[2] / "shared" / "data" / "hellaswag_val.jsonl"
BATCH_SIZES = (1, 4, 8, 16, 32)
# As many items as it takes to tell the harness's batch sizes apart.
TRIAL_ITEMS = 12
Sums = list[list[float]]


def build_model(seed: int) -> GPT2LMHeadModel:
    """Return GPT-2 124M with random weights, large enough that its answers differ as those of a trained model do."""
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(initializer_range=0.05, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)).eval()


@torch.no_grad()
def score_one_at_a_time(model: GPT2LMHeadModel, tokenizer, items: list[HellaSwagItem]) -> Sums:
    """Score the `original` protocol as one writes it first: four padded rows an item, and all of their logits."""
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
    """Return what scores the harness's requests of these items at a batch size."""
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


def score_ours(model: torch.nn.Module, tokenizer, items: list[HellaSwagItem], protocol: str) -> Sums:
    result = evaluate_hellaswag(model, encode_hellaswag(items, tokenizer, protocol), show_progress=False)
    return [list(item.nll) for item in result.scored_items]


def measure(function: Callable[[], Sums]) -> tuple[tuple[float, float], Sums]:
    """Return seconds by the clock and of the processor's, and the sums."""
    start = time.perf_counter(), time.process_time()
    sums = function()
    return (time.perf_counter() - start[0], time.process_time() - start[1]), sums


def count_flops(model: GPT2LMHeadModel, encoded: EncodedHellaSwag) -> tuple[int, int]:
    """Return the operations of matrix products for plain rows without padding, and for rows that share a context."""
    head = model.lm_head.weight.numel()
    body = sum(parameter.numel() for name, parameter in model.transformer.h.named_parameters() if parameter.dim() == 2)
    attention = 2 * model.config.n_layer * model.config.n_embd  # of a token and one that it may look at
    plain = shared = 0
    for item in encoded.items:
        n_context = len(item.context_ids)
        for ids in item.ending_ids:
            n_read = n_context + len(ids) - 1
            plain += 2 * n_read * (body + head) + attention * n_read**2
        n_places = item.n_read - n_context + 1
        shared += 2 * item.n_read * body + 2 * n_places * head + attention * item.n_read**2
    return plain, shared


def main() -> None:
    """Print items a second, and what they are worth beside each other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_file", type=Path, default=REAL_FILE, help="HellaSwag items")
    parser.add_argument("--items", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0, help="of the items and of the weights")
    options = parser.parse_args()
    if not options.data_file.exists():
        print(f"{options.data_file} is missing: give HellaSwag's validation items by --data_file")
        return
    prepare_cpu_process()
    silence_harness()
    tokenizer, model = load_tokenizer(), build_model(options.seed)
    items = random.Random(options.seed).sample(load_hellaswag(options.data_file), options.items)
    harness, trial = build_harness(model, tokenizer, items), build_harness(model, tokenizer, items[:TRIAL_ITEMS])
    trial(1)  # warms up
    trials = {batch_size: measure(partial(trial, batch_size))[0] for batch_size in BATCH_SIZES}
    batch_size = min(trials, key=lambda size: trials[size][1])
    in_bf16 = build_model(options.seed).bfloat16()
    peers = {
        "ours, lm_eval": partial(score_ours, model, tokenizer, items, "lm_eval"),
        "harness": partial(harness, batch_size),
        "ours, original": partial(score_ours, model, tokenizer, items, "original"),
        "one at a time": partial(score_one_at_a_time, model, tokenizer, items),
        "ours, lm_eval, bf16": partial(score_ours, in_bf16, tokenizer, items, "lm_eval"),
        "ours, original, bf16": partial(score_ours, in_bf16, tokenizer, items, "original"),
    }
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in peers}
    sums: dict[str, Sums] = {}
    for _ in range(options.rounds):
        for name, peer in peers.items():
            elapsed, sums[name] = measure(peer)
            seconds[name].append(elapsed)
            print(f"{name}: {elapsed[0]:.1f} s, {elapsed[1]:.1f} s of the processor", flush=True)

    print(f"GPT-2 124M, {len(items)} items, {torch.get_num_threads()} threads, medians of {options.rounds}")
    print(f"harness at batch size {batch_size}, the best of {', '.join(map(str, BATCH_SIZES))}")
    rate = {name: len(items) / torch.tensor(times).median(dim=0).values for name, times in seconds.items()}
    for name in peers:
        print(f"{name:22} {rate[name][0]:7.2f} items/s, {rate[name][1]:7.2f} a second of the processor")
    for protocol, other in (("lm_eval", "harness"), ("original", "one at a time")):
        ours, bf16 = f"ours, {protocol}", f"ours, {protocol}, bf16"
        encoded = encode_hellaswag(items, tokenizer, protocol)
        plain, shared = count_flops(model, encoded)
        difference = (torch.tensor(sums[ours]) - torch.tensor(sums[other])).abs().max().item()
        for name in (ours, bf16):
            by_clock, by_processor = (rate[name] / rate[other]).tolist()
            print(f"{name} / {other}: {by_clock:.2f} times, {by_processor:.2f} by the processor")
        print(f"  FLOP ratio {plain / shared:.2f}; float32 sums within {difference:.1e}")
        picked, picked_in_bf16 = (pick_all(encoded, sums[name]) for name in (ours, bf16))
        shares = (picked == picked_in_bf16).double().mean(dim=0).tolist()
        print(f"  the same ending in bf16: {shares[0]:.1%} by acc, {shares[1]:.1%} by acc_norm")


def pick_all(encoded: EncodedHellaSwag, sums: Sums) -> torch.Tensor:
    return torch.tensor(
        [pick_endings(nll, item.ending_lengths) for nll, item in zip(sums, encoded.items, strict=True)]
    )


if __name__ == "__main__":
    main()
