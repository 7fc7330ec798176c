"""Updates of train.py: one graph, one synchronization, the losses of stock GPT-2, and overflows under fp16."""

import contextlib
import io
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from small_runs import flags, read_losses, read_series, run_training
from torch._dynamo.utils import counters
from transformers import GPT2LMHeadModel

import train
from gpu.conftest import Scale
from modeling_gpt2_repro.evaluation.hellaswag_data import SAMPLE_FILE
from modeling_gpt2_repro.training.building import build_model
from modeling_gpt2_repro.training.config import TrainingConfig

BARE = {"eval_every": 0, "hellaswag_every": 0, "sample_every": 0, "save_every": 0}
USUAL_SCALE = 2.0**16


@dataclass
class WatchedRun:
    """What a run did: after each update the number of graphs, and in it the lines that waited for the device."""

    output: str = ""
    metrics: dict[str, list[int]] = field(default_factory=dict)
    graph_breaks: dict[str, int] = field(default_factory=dict)
    graphs: list[int] = field(default_factory=list)
    waits: list[list[str]] = field(default_factory=list)


@contextlib.contextmanager
def recorded_waits(scale: Scale) -> Iterator[list[str]]:
    """Record the lines that wait for a CUDA device."""
    found: list[str] = []
    if not scale.is_cuda:
        yield found
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
    # Setting the mode itself also warns once.
    sign = "called a synchronizing CUDA operation"
    found += [f"{each.filename}:{each.lineno}" for each in caught if sign in str(each.message)]


@pytest.fixture(scope="module")
def watched_run(scale, corpus, tmp_path_factory) -> WatchedRun:
    """Ten updates, with validation, HellaSwag, samples and checkpoints between them."""
    folder, seen, update = tmp_path_factory.mktemp("watched"), WatchedRun(), train.update

    def watch(run, *arguments):
        with recorded_waits(scale) as waits:
            update(run, *arguments)
        seen.waits.append(waits)
        seen.graphs.append(counters["stats"]["unique_graphs"])

    torch._dynamo.reset()
    counters.clear()
    between = {"eval_every": 2, "hellaswag_every": 3, "sample_every": 3, "save_every": 3, "max_steps": 10}
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(io.StringIO()) as output,
        torch._dynamo.config.patch(error_on_recompile=True),
    ):
        patch.setattr(train, "update", watch)
        argv = flags(corpus, folder, **scale.settings, **between, hellaswag_file=SAMPLE_FILE, hellaswag_limit=12)
        assert train.main(argv) == 0
    seen.output, seen.graph_breaks = output.getvalue(), dict(counters["graph_break"])
    for name in ("val/loss", "hellaswag/acc_norm", "train/checkpoint_seconds"):
        seen.metrics[name] = list(read_series(folder / "run", name))
    return seen


def test_updates_are_one_graph_despite_evaluations_between_them(watched_run):
    assert "torch.compile failed" not in watched_run.output and "x 4 micro-step(s)" in watched_run.output
    assert watched_run.metrics == {
        "val/loss": [0, 2, 4, 6, 8, 10],
        "hellaswag/acc_norm": [0, 3, 6, 9, 10],
        "train/checkpoint_seconds": [3, 6, 9, 10],
    }
    assert watched_run.output.count(" sample: ") == 5
    assert watched_run.graphs == [1] * 10
    assert watched_run.graph_breaks == {}


def test_an_update_waits_for_the_device_once(scale, watched_run):
    if not scale.is_cuda:
        pytest.skip("nothing waits for a CPU")
    with recorded_waits(scale) as waits:
        torch.ones(1, device=scale.device).item()
    assert len(waits) == 1  # otherwise waits would go unnoticed
    # The loss and the gradient norm are read together.
    assert [len(waits) for waits in watched_run.waits[-3:]] == [1, 1, 1], watched_run.waits[-1]


def test_losses_match_a_plain_loop_over_stock_gpt2(scale, corpus, tmp_path, tokenizer, exact_float32):
    """The same windows, accumulation, clipping, schedule and optimizer, on transformers' own model."""
    n_steps, settings = 20, {**scale.settings, **BARE, "mixed_precision": "no", "tf32": False, "grad_clip": 0.5}
    torch._dynamo.reset()
    run = run_training(corpus, tmp_path, **settings, max_steps=n_steps)
    assert counters["stats"]["unique_graphs"] > 0

    length, n_windows = scale.sequence_length, 4 * scale.micro_batch_size
    build_model("scratch", TrainingConfig(**scale.shape, sequence_length=length), tokenizer).save_pretrained(
        tmp_path / "start"
    )
    stock = GPT2LMHeadModel.from_pretrained(tmp_path / "start", attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
    stock = stock.to(scale.device).train()
    decayed = [parameter for parameter in stock.parameters() if parameter.dim() >= 2]
    others = [parameter for parameter in stock.parameters() if parameter.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    shards = [np.load(path) for path in sorted(corpus.glob("*_train_*.npy"))]
    tokens = torch.from_numpy(np.concatenate(shards).astype(int)).to(scale.device)
    losses, norms = {}, {}
    for step in range(n_steps):
        # Two steps of warm-up, then half a cosine down to a tenth.
        decay = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - 2) / (n_steps - 2)))
        for group in optimizer.param_groups:
            group["lr"] = scale.learning_rate * ((step + 1) / 2 if step < 2 else decay)
        starts = range(length * n_windows * step, length * n_windows * (step + 1), length)
        windows = torch.stack([tokens[start : start + length + 1] for start in starts])
        logits = stock(windows[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        norms[step + 1] = torch.nn.utils.clip_grad_norm_(stock.parameters(), 0.5).item()
        losses[step + 1] = loss.item()
        optimizer.step()
    assert max(norms.values()) > 0.5  # otherwise clipping would not be tested
    assert losses[n_steps] < losses[1] - 0.1  # nor would updates
    assert read_losses(run) == pytest.approx(losses, abs=1e-4)
    assert read_series(run, "train/grad_norm") == pytest.approx(norms, rel=1e-2)


def test_an_fp16_update_that_overflows_is_skipped_and_halves_the_scale(scale, corpus, tmp_path, monkeypatch):
    start, update, seen = train.start_accelerator, train.update, {}

    def start_with_scaler(*arguments, **settings):
        """accelerate has a scaler only for GPUs."""
        accelerator = start(*arguments, **settings)
        accelerator.scaler = accelerator.scaler or torch.amp.GradScaler(scale.device.type)
        return accelerator

    def overflow_in_third(run, step, *arguments):
        scaler, loss_model = run.accelerator.scaler, run.loss_model
        before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
        if step == 2:
            # Too large for fp16. On a CPU, float32 stands in for it and also needs a larger loss.
            scaler.update(2.0**60 if scale.is_cuda else 2.0**120)
            if not scale.is_cuda:
                run.loss_model = lambda windows: loss_model(windows) * 2.0**20
        scale_before = scaler.get_scale()
        update(run, step, *arguments)
        run.loss_model = loss_model
        is_same = all(torch.equal(before[name], tensor) for name, tensor in run.model.state_dict().items())
        count = int(run.optimizer.state_dict()["state"][0]["step"])
        seen[step + 1] = (is_same, count, scaler.get_scale() / scale_before)
        if step == 2:
            scaler.update(USUAL_SCALE)

    monkeypatch.setattr(train, "start_accelerator", start_with_scaler)
    monkeypatch.setattr(train, "update", overflow_in_third)
    torch._dynamo.reset()
    run = run_training(corpus, tmp_path, **scale.settings | BARE | {"mixed_precision": "fp16", "max_steps": 12})
    # Whether the weights are unchanged, the number of updates that AdamW counts, and the change of the scale.
    assert seen == {step: (step == 3, step - (step >= 3), 0.5 if step == 3 else 1.0) for step in range(1, 13)}
    assert list(read_series(run, "train/grad_norm")) == [step for step in range(1, 13) if step != 3]
    losses = read_losses(run)
    assert list(losses) == list(range(1, 13)) and losses[12] < losses[1] - 0.1
