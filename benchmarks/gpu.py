"""Tests and measurements on a GPU, in parts of ten minutes at most.

    python benchmarks/gpu.py correct                 # tests/gpu
    python benchmarks/gpu.py speed                   # one training step, evaluation, checkpoints
    python benchmarks/gpu.py train --data_dir D      # 120 real steps, stopped by SIGTERM half-way and resumed
    python benchmarks/gpu.py sizes --data_dir D      # 350M, 774M and 1558M, each tried with `train.py --smoke`

Several parts can be given at once. Each has a deadline and is a process of its own, and a measurement that fails does
not affect the others. Figures are written to JSON after every part and printed as a table at the end, on an H100 with
the predicted values. Without a GPU, or with --toy, the same code runs at toy size.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from functools import cached_property
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils import clip_grad_norm_
from transformers import GPT2Config, GPT2LMHeadModel
from transformers import logging as transformers_logging

from benchmarks.measurements import (
    RESULTS,
    ROOT,
    Figure,
    Omission,
    Recorder,
    Report,
    find_hellaswag,
    free_memory,
    measure_ms,
    read_entries,
    synchronize,
)
from modeling_gpt2_repro import MODEL_SIZES, GPT2ReproConfig, GPT2ReproForCausalLM
from modeling_gpt2_repro.core.devices import (
    is_out_of_memory,
    measure_peak_memory,
    prepare_cpu_process,
    reset_peak_memory,
)
from modeling_gpt2_repro.core.launch import start_accelerator
from modeling_gpt2_repro.data.tokenizer import load_tokenizer
from modeling_gpt2_repro.evaluation.hellaswag import evaluate_hellaswag
from modeling_gpt2_repro.evaluation.hellaswag_data import SAMPLE_FILE, load_hellaswag
from modeling_gpt2_repro.evaluation.hellaswag_protocols import encode_hellaswag
from modeling_gpt2_repro.evaluation.validation import evaluate_loss
from modeling_gpt2_repro.modeling_gpt2_repro import HeadCrossEntropy
from modeling_gpt2_repro.training.batch_fit import WindowLoss, fit_micro_batch
from modeling_gpt2_repro.training.checkpoint import TrainingState, save_checkpoint
from modeling_gpt2_repro.training.config import TrainingConfig
from modeling_gpt2_repro.training.optim import build_adamw
from modeling_gpt2_repro.training.plan import count_flops_per_token
from modeling_gpt2_repro.training.throughput import choose_peak, measure_peak_flops

DEADLINES = {"correct": 560, "speed": 540, "train": 540, "sizes": 540}  # seconds
CONFIG = TrainingConfig()
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
# For one H100, before anything ran there, by (measurement, unit): counted in the code that the compiler generates,
# with products at 610 TFLOP/s, attention at 230 (flash) and 330 TFLOP/s (cuDNN), and everything else at 3.0 TB/s.
PREDICTED = {
    ("step, first", "ms a micro-step"): 131,
    ("step, first", "tokens/s"): 500_000,
    ("step, first", "% MFU"): 43,
    ("step, first", "GB at most"): 29,
    ("step, last", "tokens/s"): 500_000,
    ("profile of a micro-step", "ms products"): 80,
    ("profile of a micro-step", "ms attention"): 16,
    ("profile of a micro-step", "ms element-wise"): 36,
    ("profile of a micro-step", "ms idle"): 0,
    ("attention alone, flash", "ms"): 1.6,
    ("attention alone, cudnn", "ms"): 1.1,
    ("validation, eager", "ms a batch"): 83,
    ("validation, compiled", "ms a batch"): 45,
    ("HellaSwag original, second time", "s"): 4,
    ("checkpoint", "s"): 4.3,
    ("run", "tokens/s"): 500_000,
    ("run", "% MFU"): 43,
    ("350M", "sequences at once"): 64,
    ("774M", "sequences at once"): 32,
    ("1558M", "sequences at once"): 8,
}


class Loop:
    """A training loop whose micro-steps (`micro_step()`) and updates (`finish()`) are timed separately."""

    model: nn.Module
    device: torch.device
    windows: torch.Tensor
    micro_steps: int
    peak_flops: float
    others_gb: float

    def time(self, rounds: int) -> dict[str, float]:
        """Return the figures of `rounds` updates, each of several micro-steps, by unit."""
        reset_peak_memory(self.device)
        micro, last = [], []
        for number in range(rounds + 1):
            synchronize(self.device)
            started = time.perf_counter()
            for _ in range(self.micro_steps):
                self.micro_step()
            synchronize(self.device)
            middle = time.perf_counter()
            self.finish()
            synchronize(self.device)
            if number:  # the first round allocates the optimizer's state
                micro.append((middle - started) / self.micro_steps)
                last.append(time.perf_counter() - middle)
        ms, update_ms = 1e3 * statistics.median(micro), 1e3 * statistics.median(last)
        n_windows, n_tokens = self.windows.shape
        per_update = CONFIG.tokens_per_step / (n_windows * (n_tokens - 1))
        seconds = (per_update * ms + update_ms) / 1e3
        rate = CONFIG.tokens_per_step / seconds
        mfu = 100 * rate * count_flops_per_token(self.model, n_tokens - 1) / self.peak_flops
        return {
            "ms a micro-step": ms,
            "ms an update's end": update_ms,
            "tokens/s": rate,
            "% MFU": mfu,
            "GB at most": measure_peak_memory(self.device) - self.others_gb,
        }


def measure_allocated_gb(device: torch.device) -> float:
    """Return the memory already allocated on a CUDA device, which the next measurement subtracts."""
    return torch.cuda.memory_allocated(device) / 1e9 if device.type == "cuda" else 0.0


class OurLoop(Loop):
    """train.py's update, on random tokens."""

    def __init__(self, bench: "Speed", size: int, compile: str = "on"):
        self.accelerator, self.device, self.micro_steps = bench.accelerator, bench.device, bench.micro_steps
        self.peak_flops = bench.peak_flops
        self.model = bench.build_model()
        optimizer = build_adamw(self.model, 6e-4, 0.1, (0.9, 0.95))
        self.windows = bench.draw_windows(size)
        torch._dynamo.reset()  # or the graphs of other loops would count toward its recompile limit
        self.accelerator.free_memory()  # it keeps references to all that it prepared
        self.others_gb = measure_allocated_gb(self.device)
        started = time.perf_counter()
        fit = fit_micro_batch(WindowLoss(self.model), self.windows, [size], compile, self.accelerator, print)
        self.start_seconds = time.perf_counter() - started
        assert compile == "off" or isinstance(fit.loss_model, torch._dynamo.OptimizedModule), "not compiled"
        self.windows = self.windows.to(self.device)
        self.loss_model, self.optimizer = self.accelerator.prepare(fit.loss_model, optimizer)

    def micro_step(self) -> None:
        loss = self.loss_model(self.windows) / self.micro_steps
        self.accelerator.backward(loss)
        self.loss = loss.detach()

    def finish(self) -> None:
        grad_norm = self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
        torch.stack([self.loss, grad_norm]).tolist()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class StockLoop(Loop):
    """The straightforward loop: transformers' model, compiled and called with labels, and fused AdamW."""

    def __init__(self, bench: "Speed", size: int):
        self.device, self.micro_steps, self.peak_flops = bench.device, bench.micro_steps, bench.peak_flops
        self.others_gb = measure_allocated_gb(self.device)
        no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        self.model = GPT2LMHeadModel(GPT2Config(**bench.shape, **no_dropout)).to(self.device).train()
        self.model.load_state_dict(bench.build_model().state_dict())
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=6e-4, betas=(0.9, 0.95), fused=True)
        self.forward = torch.compile(self.model, dynamic=False)
        self.windows = bench.draw_windows(size).to(self.device)
        self.inputs = self.windows[:, :-1].contiguous()

    def micro_step(self) -> None:
        with torch.autocast(self.device.type, torch.bfloat16):
            self.loss = self.forward(self.inputs, labels=self.inputs, use_cache=False).loss / self.micro_steps
        self.loss.backward()

    def finish(self) -> None:
        clip_grad_norm_(self.model.parameters(), 1.0).item()
        self.loss.item()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class Speed:
    """The part `speed`: one step in many forms, evaluation, and a checkpoint."""

    def __init__(self, recorder: Recorder, options: argparse.Namespace):
        self.recorder, self.is_toy = recorder, options.toy
        self.hellaswag_file = options.hellaswag_file or find_hellaswag(SAMPLE_FILE)
        self.accelerator = start_accelerator("bf16", tf32=True)
        self.device = self.accelerator.device
        self.peak_flops = choose_peak(self.device, self.accelerator.mixed_precision).flops
        small = {"n_layer": 1, "n_head": 2, "n_embd": 32, "n_positions": 256}
        self.shape = small if self.is_toy else MODEL_SIZES["124M"] | {"n_positions": 1024}
        self.sequence_length, self.size = (32, 4) if self.is_toy else (1024, 64)
        self.micro_steps, self.rounds = (2, 2) if self.is_toy else (8, 3)

    def build_model(self) -> GPT2ReproForCausalLM:
        torch.manual_seed(0)
        return GPT2ReproForCausalLM(GPT2ReproConfig(**self.shape)).to(self.device).train()

    def draw_windows(self, size: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        return torch.randint(0, 50257, (size, self.sequence_length + 1), generator=generator)

    def run(self) -> None:
        """Make all measurements, the most important ones first."""
        measure, seconds = self.recorder.measure, 0 if self.is_toy else 45
        measure("machine", self.measure_machine)
        measure("step, first", self.measure_first_step)
        measure("stock GPT-2, compiled", self.measure_stock, seconds)
        measure("profile of a micro-step", self.profile, seconds / 3)
        for name in ("eager", "compiled"):
            measure(f"validation, {name}", lambda name=name: self.measure_validation(name), seconds / 2)
        self.measure_hellaswag()
        measure("checkpoint", self.measure_checkpoint, seconds / 3)
        for name, backend in self.list_backends():
            measure(f"attention alone, {name}", lambda backend=backend: self.measure_attention(backend))
        for chunk in (64,) if self.is_toy else (4096, 8192, 16_384, 32_768):
            measure(
                f"head and loss alone, chunks of {chunk:,}", lambda chunk=chunk: self.measure_loss(chunk), seconds / 3
            )
        measure("step, eager", lambda: self.measure_step(self.size, compile="off"), seconds / 3)
        for name, backend in self.list_backends()[:2]:
            measure(f"step, attention {name}", lambda backend=backend: self.measure_backend(backend), seconds)
        for size in () if self.is_toy else (32, 16, 96):
            measure(f"step, {size} sequences at once", lambda size=size: self.measure_step(size), 2 * seconds)
        measure("step, last", lambda: self.loop.time(self.rounds), seconds / 2)

    def list_backends(self) -> list[tuple[str, SDPBackend]]:
        return list(BACKENDS.items()) if self.device.type == "cuda" else [("math", SDPBackend.MATH)]

    def measure_machine(self) -> dict[str, float]:
        block = torch.empty(2**20 if self.is_toy else 2**31, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(block)
        ms = measure_ms(lambda: target.copy_(block), self.device, 5)
        flops = measure_peak_flops(self.device, "no" if self.is_toy else "bf16")
        return {"TB/s copied": 2 * block.numel() / ms / 1e9, "TFLOP/s of a product": flops / 1e12}

    @cached_property
    def loop(self) -> OurLoop:
        """The loop that is measured first and last; its model is evaluated and saved."""
        return OurLoop(self, self.size)

    def measure_first_step(self) -> dict[str, float]:
        return {"s to compile and try": self.loop.start_seconds, **self.loop.time(self.rounds)}

    def measure_step(self, size: int, compile: str = "on") -> dict[str, float]:
        return OurLoop(self, size, compile).time(self.rounds)

    def measure_backend(self, backend: SDPBackend) -> dict[str, float]:
        with sdpa_kernel([backend]):
            return self.measure_step(self.size)

    def measure_stock(self) -> dict[str, float]:
        size = self.size
        while True:
            try:
                stock = StockLoop(self, size)
                stock.time(1)
                break
            except RuntimeError as error:
                if not is_out_of_memory(error) or size == 1:
                    raise
                size //= 2
            stock = None
            torch._dynamo.reset()
            free_memory()
        ours, theirs = [], []
        for _ in range(1 if self.is_toy else 3):  # taking turns
            free_memory()
            ours.append(self.loop.time(1)["tokens/s"])
            free_memory()
            theirs.append(stock.time(1))
        rate = statistics.median(each["tokens/s"] for each in theirs)
        return {
            "sequences at once": size,
            "ms a micro-step": theirs[-1]["ms a micro-step"],
            "tokens/s": rate,
            "GB at most": theirs[-1]["GB at most"],
            f"x as fast: GPT2ReproForCausalLM, {self.size} sequences at once": statistics.median(ours) / rate,
        }

    def profile(self) -> dict[str, float]:
        """Return the device time of a micro-step by kind of kernel, and the idle time."""
        is_cuda, n_steps = self.device.type == "cuda", 3
        activities = [torch.profiler.ProfilerActivity.CUDA if is_cuda else torch.profiler.ProfilerActivity.CPU]
        self.loop.micro_step()
        synchronize(self.device)
        with torch.profiler.profile(activities=activities) as profiler:
            started = time.perf_counter()
            for _ in range(n_steps):
                self.loop.micro_step()
            synchronize(self.device)
            elapsed = 1e3 * (time.perf_counter() - started) / n_steps
        self.loop.optimizer.zero_grad(set_to_none=True)
        shares = dict.fromkeys((*KERNEL_KINDS, "element-wise"), 0.0)
        for event in profiler.key_averages():
            is_kernel = not getattr(event, "is_user_annotation", False)
            if is_kernel and is_cuda == (event.device_type == torch.autograd.DeviceType.CUDA):
                time_us = event.self_device_time_total if is_cuda else event.self_cpu_time_total
                shares[classify_kernel(event.key)] += time_us / 1e3 / n_steps
        assert sum(shares.values()) > 0, "the profiler recorded no kernels"
        shares["idle"] = max(0.0, elapsed - sum(shares.values()))
        return {f"ms {kind}": ms for kind, ms in shares.items()}

    def measure_attention(self, backend: SDPBackend) -> dict[str, float]:
        n_head = self.shape["n_head"]
        shape = (self.size, n_head, self.sequence_length, self.shape["n_embd"] // n_head)
        query, key, value, grad = (torch.randn(shape, device=self.device, dtype=torch.bfloat16) for _ in range(4))
        inputs = [tensor.requires_grad_() for tensor in (query, key, value)]

        def attend() -> None:
            with sdpa_kernel([backend]):
                out = scaled_dot_product_attention(*inputs, is_causal=True)
            torch.autograd.grad(out, inputs, grad)

        return {"ms": measure_ms(attend, self.device, 10)}

    def measure_loss(self, chunk: int) -> dict[str, float]:
        n_tokens, width = self.size * self.sequence_length, self.shape["n_embd"]
        others_gb = measure_allocated_gb(self.device)
        states = torch.randn(n_tokens, width, device=self.device).requires_grad_()
        weight = (0.02 * torch.randn(50257, width, device=self.device)).requires_grad_()
        targets = torch.randint(0, 50257, (n_tokens,), device=self.device)

        @torch.compile(dynamic=False)
        def compute(states: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return HeadCrossEntropy.apply(states, weight, targets, chunk)

        def step() -> None:
            with torch.autocast(self.device.type, torch.bfloat16):
                loss = compute(states, weight, targets)
            torch.autograd.grad(loss, (states, weight))

        reset_peak_memory(self.device)
        return {"ms": measure_ms(step, self.device, 5), "GB at most": measure_peak_memory(self.device) - others_gb}

    def measure_validation(self, mode: str) -> dict[str, float]:
        n_batches = 2 if self.is_toy else 8
        windows = list(self.draw_windows(n_batches * self.size))
        model = self.loop.model
        if mode == "compiled":
            model = CompiledForward(model)
        options = {"batch_size": self.size, "n_bytes": 1, "accelerator": self.accelerator}
        evaluate_loss(model, windows, self.size, **options)
        started = time.perf_counter()
        result = evaluate_loss(model, windows, len(windows), **options)
        return {"ms a batch": 1e3 * (time.perf_counter() - started) / n_batches, "nats": result.loss}

    def measure_hellaswag(self) -> None:
        for protocol in ("original", "lm_eval"):
            encoded = []

            def encode(protocol: str = protocol, encoded: list = encoded) -> dict[str, float]:
                items = load_hellaswag(self.hellaswag_file, 8 if self.is_toy else None)
                started, tokenizer = time.perf_counter(), load_tokenizer()
                encoded.append(encode_hellaswag(items, tokenizer, protocol))
                return {"s": time.perf_counter() - started, "items": len(items)}

            def score(encode=encode, encoded: list = encoded) -> dict[str, float]:
                if not encoded:
                    encode()
                started = time.perf_counter()
                with self.accelerator.autocast():
                    result = evaluate_hellaswag(
                        self.loop.model, encoded[0], accelerator=self.accelerator, show_progress=False
                    )
                return {"s": time.perf_counter() - started, "acc_norm": result.acc_norm}

            self.recorder.measure(f"HellaSwag {protocol}, encoded", encode)
            for order in ("first", "second"):
                self.recorder.measure(f"HellaSwag {protocol}, {order} time", score, 0 if self.is_toy else 30)

    def measure_checkpoint(self) -> dict[str, float]:
        state = TrainingState(step=1, tokens=0, experiment={}, skips=[], tracker_run_id="")
        with tempfile.TemporaryDirectory() as name:
            started = time.perf_counter()
            path = save_checkpoint(Path(name), state, self.loop.model, load_tokenizer(), self.loop.optimizer)
            seconds = time.perf_counter() - started
            size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        return {"s": seconds, "GB": size / 1e9}


class CompiledForward(nn.Module):
    """A model with a compiled forward pass, for `evaluate_loss`."""

    def __init__(self, model: GPT2ReproForCausalLM):
        super().__init__()
        self.model = model
        self._forward = torch.compile(model.forward, dynamic=False)

    def forward(self, input_ids: torch.Tensor, shift_labels: torch.Tensor, use_cache: bool, skip_logits: bool):
        return self._forward(
            input_ids=input_ids, shift_labels=shift_labels, use_cache=use_cache, skip_logits=skip_logits
        )


KERNEL_KINDS = {
    "attention": re.compile(r"flash|fmha|attention|sdpa|mha_|cudnn_generated", re.IGNORECASE),
    "products": re.compile(
        r"gemm|nvjet|cutlass|cublas|xmma|(?<![a-z])mm(?![a-z])|matmul|addmm|aten::bmm|aten::linear|mkldnn",
        re.IGNORECASE,
    ),
}


def classify_kernel(name: str) -> str:
    """Return the kind of a kernel by its name. The compiler's (Triton) are named after all operations they fuse."""
    if name.startswith("triton_") and not name.startswith("triton_tem"):
        return "element-wise"
    return next((kind for kind, pattern in KERNEL_KINDS.items() if pattern.search(name)), "element-wise")


def measure_correctness(recorder: Recorder, options: argparse.Namespace) -> None:
    """Run tests/gpu and count the outcomes; a failed test is an omission, as is one that was skipped on a GPU."""
    with tempfile.TemporaryDirectory() as name:
        report = Path(name) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-rs", f"--junitxml={report}", "tests/gpu"]
        command += ["-k", options.tests] if options.tests else []
        environment = os.environ | ({"GPU_TESTS_DEVICE": "cpu"} if options.toy else {})
        # A process group, because tests start processes, which must not outlive them on the device.
        process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
        try:
            process.wait(recorder.seconds_left - 25)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # pytest writes its report
            recorder.omit("all tests", "the deadline passed before they ended")
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(15)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        recorder.measure("tests", lambda: read_report(report, recorder, skips_fail=not options.toy))


def read_report(path: Path, recorder: Recorder, skips_fail: bool) -> dict[str, float]:
    """Return the number of tests by outcome from pytest's report; record failed and skipped ones as omissions."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    for case in ElementTree.parse(path).iter("testcase"):
        problem = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        outcome = "passed" if problem is None else "skipped" if problem.tag == "skipped" else "failed"
        counts[outcome] += 1
        if outcome == "failed" or (outcome == "skipped" and skips_fail):
            recorder.omit(case.get("name"), f"{outcome}: {problem.get('message')}")
    assert sum(counts.values()) > 0, "pytest found no tests"
    return counts


def train_and_resume(recorder: Recorder, options: argparse.Namespace) -> None:
    """Make 120 steps of the full run with train.py, stopped by SIGTERM half-way and resumed."""
    n_steps, stop_at = (12, 6) if options.toy else (120, 60)
    with tempfile.TemporaryDirectory() as name:
        flags = [f"--data_dir={options.data_dir}", f"--output_dir={name}", "--run_name=run", "--report_to=none"]
        flags += [f"--hellaswag_file={options.hellaswag_file or find_hellaswag(SAMPLE_FILE)}"]
        flags += list_toy_flags() if options.toy else ["--max_steps=19073"]
        folder = Path(name) / "run"

        def run_until(step: int) -> float:
            """Run train.py, stop it after that many steps, and return the seconds to its first one."""
            first, started = None, time.monotonic()
            n_before, losses = len(read_losses(folder)), {}
            process = subprocess.Popen([sys.executable, "train.py", *flags], cwd=ROOT)
            try:
                while process.poll() is None and max(losses, default=0) < step:
                    time.sleep(0.05)
                    losses = read_losses(folder)
                    if first is None and len(losses) > n_before:
                        first = time.monotonic() - started
                    if recorder.seconds_left < 30:
                        raise TimeoutError(f"only {len(losses)} steps by the deadline")
                process.send_signal(signal.SIGTERM)
                code = process.wait(timeout=recorder.seconds_left)
            finally:
                process.kill()
            assert code == 75, f"train.py exited with {code} on SIGTERM, expected 75"
            return first

        recorder.measure("first half", lambda: {"s to the first step": run_until(stop_at)})
        recorder.measure("second half, resumed", lambda: {"s to the first step": run_until(n_steps)})
        recorder.measure("run", lambda: summarize_run(folder, stop_at))


def summarize_run(folder: Path, stop_at: int) -> dict[str, float]:
    """Return the figures of a run in two halves, and the jump of the loss where the second one begins."""
    losses, lines = read_losses(folder), read_metrics(folder)
    steps = sorted(losses)
    assert steps == list(range(1, steps[-1] + 1)), "a step is missing or repeated"
    resumed = next(step for step in steps if step > stop_at and step - 1 in read_saved_steps(folder))
    around = [abs(losses[step] - losses[step - 1]) for step in steps[1:] if abs(step - resumed) <= stop_at // 2]
    steady = [line for line in lines if "train/loss" in line and line["step"] not in (1, resumed)]

    def median(key: str) -> float:
        return statistics.median(line[key] for line in steady)

    return {
        "steps": steps[-1],
        "tokens/s": median("train/tokens_per_second"),
        "% MFU": 100 * median("train/mfu"),
        "GB at most": max(line["train/peak_memory_gb"] for line in steady),
        "s waited for data, a step": median("train/data_wait_seconds"),
        "s a checkpoint": next(
            line["train/checkpoint_seconds"] for line in lines if "train/checkpoint_seconds" in line
        ),
        "nats, first step": losses[1],
        "nats, last step": losses[steps[-1]],
        "nats of jump at the resume": abs(losses[resumed] - losses[resumed - 1]),
        "nats of jump, largest around it": max(around),
    }


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """Return the complete lines of a run's metrics.jsonl."""
    try:
        text = (folder / "metrics.jsonl").read_text()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def read_losses(folder: Path) -> dict[int, float]:
    return {line["step"]: line["train/loss"] for line in read_metrics(folder) if "train/loss" in line}


def read_saved_steps(folder: Path) -> set[int]:
    return {line["step"] for line in read_metrics(folder) if "train/checkpoint_seconds" in line}


def list_toy_flags() -> list[str]:
    """Return the flags of a run that takes seconds on a CPU."""
    return [
        "--n_layer=2",
        "--n_head=2",
        "--n_embd=32",
        "--sequence_length=32",
        "--tokens_per_step=256",
        "--eval_every=0",
        "--max_steps=500",
        "--warmup_tokens=512",
        "--hellaswag_every=0",
        "--sample_every=0",
        "--compile=off",
    ]


def try_sizes(recorder: Recorder, options: argparse.Namespace) -> None:
    """Try the larger models with `train.py --smoke`: ten steps each."""
    expected = {"124M": 0} if options.toy else {"350M": 120, "774M": 180, "1558M": 280}
    for name, seconds in expected.items():

        def smoke(name: str = name) -> dict[str, float]:
            with tempfile.TemporaryDirectory() as folder:
                flags = [f"--data_dir={options.data_dir}", f"--output_dir={folder}", "--smoke", "--report_to=none"]
                flags += list_toy_flags() if options.toy else [f"--model_size={name}", "--tokens_per_step=65536"]
                command = [sys.executable, "train.py", *flags, "--hellaswag_every=0", "--max_steps=100"]
                limit = max(1.0, recorder.seconds_left)
                result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit)
            print(result.stdout[-3000:], result.stderr[-3000:], flush=True)
            assert result.returncode == 0, result.stderr.strip().splitlines()[-1:]
            return read_smoke_test(result.stdout)

        recorder.measure(name, smoke, seconds)


def read_smoke_test(output: str) -> dict[str, float]:
    """Return the figures from the output of `train.py --smoke`."""
    measured = re.search(r"measured +([\d,]+) tokens/s.* MFU ([\d.]+)%", output)
    return {
        "sequences at once": float(re.search(r"x (\d+) sequence\(s\)", output)[1]),
        "tokens/s": float(measured[1].replace(",", "")),
        "% MFU": float(measured[2]),
        "GB at most": float(re.search(r"memory +([\d.]+) GB", output)[1]),
        "is compiled": float("compiling" in output and "eager" not in output),
    }


def measure_speed(recorder: Recorder, options: argparse.Namespace) -> None:
    Speed(recorder, options).run()


PARTS = {"correct": measure_correctness, "speed": measure_speed, "train": train_and_resume, "sizes": try_sizes}


def run_part(part: str, path: Path, options: argparse.Namespace) -> None:
    """Make the measurements of a part; called in a process of its own."""
    transformers_logging.set_verbosity_error()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if options.toy:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    prepare_cpu_process()
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # or a "compiled" figure could be an eager one
    predicted = PREDICTED if "H100" in options.device_name else {}
    recorder = Recorder(part, path, options.deadline or DEADLINES[part], predicted, options.only)
    PARTS[part](recorder, options)


def main() -> int:
    """Run the parts one after the other. Return 1 if anything failed or was left out, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument(
        "--data_dir", default="data/demo", help="shards to train on, with GPT-2's tokens, such as those of `make demo`"
    )
    parser.add_argument("--hellaswag_file", help="HellaSwag's validation items (default: .gpu/hellaswag_val.jsonl.gz)")
    parser.add_argument("--output", type=Path, help="file of results (default: benchmarks/results/DEVICE_PARTS.json)")
    parser.add_argument("--deadline", type=float, help="seconds for each part (default: about nine minutes)")
    parser.add_argument("--only", default="", help="regular expression: make only the measurements whose names match")
    parser.add_argument("--tests", help="for correct: pytest's -k")
    parser.add_argument("--toy", action="store_true", help="run at toy size on the CPU")
    options = parser.parse_args()
    options.toy = options.toy or not torch.cuda.is_available()
    options.data_dir = str(Path(options.data_dir).absolute())
    context, report = multiprocessing.get_context("spawn"), Report("gpu", options)
    gpu, entries = report.environment["machine"]["gpu"], []
    options.device_name = gpu["name"] if gpu else "cpu"
    slug = re.sub(r"\W+", "_", options.device_name.lower())
    default = ROOT / "build" / "gpu_toy.json" if options.toy else RESULTS / f"{slug}_{'_'.join(options.parts)}.json"
    output = options.output or default
    with tempfile.TemporaryDirectory() as name:
        for part in options.parts:
            path = Path(name) / part
            process = context.Process(target=run_part, args=(part, path, options))
            process.start()
            process.join((options.deadline or DEADLINES[part]) + 20)
            if process.is_alive():
                process.kill()
                process.join()
            entries += read_entries(path)
            if process.exitcode != 0:
                entries.append(Omission(part, "whole part", f"exit code {process.exitcode}"))
            report.figures = [entry for entry in entries if isinstance(entry, Figure)]
            report.omissions = [entry for entry in entries if isinstance(entry, Omission)]
            report.write(output)
    return 1 if report.omissions else 0


if __name__ == "__main__":
    sys.exit(main())
