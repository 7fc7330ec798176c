"""The schema of a benchmark's results, its only writer, and the helpers that benchmarks share.

{"schema": 2, "benchmark": "loss", "command": "python benchmarks/bench_loss.py", "date": ..., "commit": ...,
 "machine": {"cpu": ..., "cores": ..., "memory_gib": ..., "instruction_sets": [...], "gpu": ...},
 "versions": {"torch": ..., ...}, "settings": {"rounds": 5, ...},
 "figures": [{"part": ..., "subject": ..., "value": ..., "unit": ..., "statistic": "median of 5", "low": ...,
              "high": ..., "ratios": {"another subject": ...}, "predicted": ...}],
 "notes": {"a subject": ...}, "omissions": [{"part": ..., "subject": ..., "reason": ...}]}
"""

import argparse
import dataclasses
import gc
import importlib.metadata
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import torch

from modeling_gpt2_repro import MODEL_SIZES
from modeling_gpt2_repro.core.devices import count_cores, list_versions, read_container_limit, supports_bf16
from modeling_gpt2_repro.core.files import write_json

SCHEMA = 2
ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
# HellaSwag's validation items, where a user put them.
HELLASWAG_FILES = (ROOT / ".gpu" / "hellaswag_val.jsonl.gz", ROOT / ".gpu" / "hellaswag_val.jsonl")
# The published sizes, and one to try a benchmark with in seconds.
SHAPES = MODEL_SIZES | {"toy": {"n_layer": 2, "n_head": 2, "n_embd": 32}}
# Recorded beside the packages that determine the results of a run.
PEER_PACKAGES = ("datatrove", "lm_eval", "matplotlib", "pyarrow", "tensorboard", "tiktoken", "wandb")
# Flags of /proc/cpuinfo that decide how fast a CPU multiplies matrices (x86, then Arm).
INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")


@dataclass(frozen=True)
class Figure:
    """One measured value.

    Attributes:
        part: the setting that figures are compared in, such as a size.
        subject: what was measured.
        statistic: such as "median of 5"; empty for a count, a size or a percentile.
        low, high: the smallest and the largest measurement, unless `statistic` names another interval.
        ratios: value / value of another subject in the same part and unit, by subject.
        predicted: the value expected before anything ran.
    """

    part: str
    subject: str
    value: float
    unit: str
    statistic: str = ""
    low: float | None = None
    high: float | None = None
    ratios: Mapping[str, float] = field(default_factory=dict)
    predicted: float | None = None


@dataclass(frozen=True)
class Omission:
    """A measurement that failed or was left out, and why (one line)."""

    part: str
    subject: str
    reason: str


class Report:
    """What a benchmark measured, where, and with which settings.

    Args:
        benchmark: its name, which is also that of its file of results.
        settings: the parsed flags.
    """

    def __init__(self, benchmark: str, settings: argparse.Namespace):
        self.benchmark = benchmark
        self.settings = {name: _drop_folder(value) for name, value in vars(settings).items() if name != "output"}
        self.figures: list[Figure] = []
        self.omissions: list[Omission] = []
        self.notes: dict[str, str] = {}
        self.environment = describe_environment()

    def add(self, part: str, subject: str, value: float, unit: str, **details: Any) -> None:
        """Add a figure (see `Figure` for the details)."""
        self.figures.append(Figure(part, subject, float(value), unit, **details))

    def add_median(self, part: str, subject: str, values: Sequence[float], unit: str) -> None:
        """Add the median of several measurements and their range."""
        low, high = float(min(values)), float(max(values))
        self.add(
            part, subject, statistics.median(values), unit, statistic=f"median of {len(values)}", low=low, high=high
        )

    def compare(self, part: str, subject: str, *peers: str) -> None:
        """Add to each figure of a subject its ratios to those of its peers in the same part and unit."""
        values = {(each.subject, each.unit): each.value for each in self.figures if each.part == part}
        for index, each in enumerate(self.figures):
            if (each.part, each.subject) == (part, subject):
                found = {peer: each.value / values[peer, each.unit] for peer in peers if values.get((peer, each.unit))}
                self.figures[index] = dataclasses.replace(each, ratios={**each.ratios, **found})

    def omit(self, part: str, subject: str, reason: str) -> None:
        """Report a measurement as left out."""
        self.omissions.append(Omission(part, subject, reason))

    def write(self, path: Path) -> None:
        """Print the figures, and write them to a file that appears whole or not at all."""
        print(f"{format_table(self.figures, self.omissions)}\n-> {path}", flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"schema": SCHEMA, "benchmark": self.benchmark, **self.environment, "settings": self.settings}
        content |= {"figures": [asdict(each) for each in self.figures], "notes": self.notes}
        write_json(path, content | {"omissions": [asdict(each) for each in self.omissions]})


class Recorder:
    """Makes the measurements of a part until its deadline, and appends each to a file for `read_entries`.

    Args:
        seconds: until the deadline.
        predicted: values by measurement and unit.
        only: a regular expression; measurements whose names it does not match are skipped.
    """

    def __init__(
        self, part: str, path: Path, seconds: float, predicted: Mapping[tuple[str, str], float], only: str = ""
    ):
        self.part, self.path, self.predicted, self.only = part, path, predicted, only
        self.deadline = time.monotonic() + seconds

    @property
    def seconds_left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def measure(self, name: str, measurement: Callable[[], dict[str, float]], expected_seconds: float = 0.0) -> None:
        """Make a measurement, which returns values by unit. An exception in it is recorded as an omission."""
        if not re.search(self.only, name):
            return None
        if expected_seconds > self.seconds_left:
            return self.omit(name, f"left out: {self.seconds_left:.0f} s were left")
        started = time.monotonic()
        try:
            for unit, value in measurement().items():
                predicted = self.predicted.get((name, unit))
                self._write(Figure(self.part, name, float(value), unit, predicted=predicted))
        except Exception as error:
            traceback.print_exc()
            reason = next(iter(str(error).strip().splitlines()), "")
            self.omit(name, f"{type(error).__name__}: {reason}")
        free_memory()
        print(f"{self.part}: {name}, {time.monotonic() - started:.1f} s", flush=True)

    def omit(self, name: str, reason: str) -> None:
        """Record a measurement as failed or left out."""
        self._write(Omission(self.part, name, reason[:300]))

    def _write(self, entry: Figure | Omission) -> None:
        with open(self.path, "a", encoding="utf-8") as stream:
            stream.write(json.dumps([type(entry).__name__, asdict(entry)]) + "\n")


def read_entries(path: Path) -> Iterator[Figure | Omission]:
    """Yield what a part recorded, including a part that was killed."""
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        kind, content = json.loads(line)
        yield {"Figure": Figure, "Omission": Omission}[kind](**content)


def build_parser(doc: str, benchmark: str) -> argparse.ArgumentParser:
    """Return a parser of a benchmark's flags that has `--output`."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS / f"{benchmark}.json", help="file of results")
    return parser


def choose_dtype() -> str:
    """Return "bfloat16" if the device has instructions for it, else "float32", as train.py does: emulation is slow."""
    return "bfloat16" if supports_bf16(torch.device("cuda" if torch.cuda.is_available() else "cpu")) else "float32"


def free_memory() -> None:
    """Free objects that are no longer referenced, on the device too."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def synchronize(device: torch.device) -> None:
    """Wait until a device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_call(function: Callable[[], object]) -> float:
    """Return the seconds that a call takes."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def measure_ms(function: Callable[[], object], device: torch.device, rounds: int) -> float:
    """Return the median milliseconds of a call on the device, after two calls for warm-up."""
    times = []
    for number in range(rounds + 2):
        synchronize(device)
        started = time.perf_counter()
        function()
        synchronize(device)
        if number >= 2:
            times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times)


def describe_environment() -> dict[str, Any]:
    """Return `command`, `date`, `commit`, `machine` and `versions` of a file of results."""
    versions = list_versions() | {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    for package in PEER_PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "command": describe_command(sys.argv),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _describe_commit(),
        "machine": describe_machine(),
        "versions": versions,
    }


def describe_machine() -> dict[str, Any]:
    """Return the CPU's name, cores and instruction sets, the memory in GiB, and the GPU (`None` without one)."""
    memory = min(psutil.virtual_memory().total, read_container_limit("memory.max") or float("inf"))
    cpu_info = _read_cpu_info()
    flags = set(cpu_info.get("flags", cpu_info.get("Features", "")).split())
    return {
        "cpu": cpu_info.get("model name", platform.processor()),
        "cores": count_cores(),
        "memory_gib": round(memory / 2**30, 1),
        "instruction_sets": [name for name in INSTRUCTION_SETS if name in flags],
        "gpu": _describe_gpu(),
    }


def describe_command(argv: Sequence[str]) -> str:
    """Return the command that repeats a benchmark, without `--output` and the folders of other paths."""
    arguments = []
    rest = iter(argv[1:])
    for argument in rest:
        if argument == "--output":
            next(rest, None)
        elif not argument.startswith("--output="):
            arguments.append(_drop_folder(argument))
    return shlex.join(["python", f"benchmarks/{Path(argv[0]).name}", *arguments])


def read_results(path: str | os.PathLike) -> tuple[dict[str, Any], list[Figure], list[Omission]]:
    """Read a file of results: all of it, and its figures and omissions.

    Raises:
        ValueError: the file has another schema.
    """
    content = json.loads(Path(path).read_text(encoding="utf-8"))
    if content.get("schema") != SCHEMA:
        raise ValueError(f"{path} has schema {content.get('schema')}, not {SCHEMA}: run its benchmark again")
    figures = [Figure(**figure) for figure in content["figures"]]
    return content, figures, [Omission(**omission) for omission in content["omissions"]]


def format_table(figures: Sequence[Figure], omissions: Sequence[Omission]) -> str:
    """Format figures one per line, with ratios and predictions, followed by the omissions."""
    rows = [("part", "subject", "value", "unit", "statistic", "predicted", "ratios")]
    for each in figures:
        predicted = "" if each.predicted is None else format_number(each.predicted)
        ratios = ", ".join(f"{ratio:.3g} x {peer}" for peer, ratio in each.ratios.items())
        statistic = each.statistic
        if each.low is not None:
            statistic += f", {format_number(each.low)} to {format_number(each.high)}"
        rows.append((each.part, each.subject, format_number(each.value), each.unit, statistic, predicted, ratios))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if column in (2, 5) else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([*lines, *(f"NOT MEASURED  {each.part}  {each.subject}: {each.reason}" for each in omissions)])


def format_number(value: float) -> str:
    """Return a number with about four significant digits."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def find_hellaswag(fallback: Path) -> Path:
    """Return the file of HellaSwag's validation items, or `fallback` if there is none."""
    return next((path for path in HELLASWAG_FILES if path.exists()), fallback)


def _drop_folder(value: Any) -> Any:
    """Return an absolute path, alone or behind `--flag=`, without its folder, and anything else unchanged."""
    if isinstance(value, Path):
        return value.name
    return re.sub(r"(^|=)/.*/", r"\1", value) if isinstance(value, str) else value


def _describe_commit() -> str | None:
    """Return the commit, marked `-dirty` if tracked files other than results differ from it."""
    commit = _ask("git", "-C", str(ROOT), "rev-parse", "HEAD")
    status = ("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results", ":!docs")
    return f"{commit}-dirty" if commit and _ask("git", "-C", str(ROOT), *status) else commit


def _describe_gpu() -> dict[str, Any] | None:
    # nvidia-smi rather than torch, which would keep a context on the device.
    if row := _ask("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"):
        name, memory, driver = row.split(", ")
        return {"name": name, "memory": memory, "driver": driver, "count": torch.cuda.device_count()}
    if torch.cuda.is_available():
        return {"name": torch.cuda.get_device_name(0), "count": torch.cuda.device_count()}
    return None


def _ask(*command: str) -> str | None:
    """Return the first line that a command prints; `None` if it prints nothing, fails or does not exist."""
    try:
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return next(iter(output.splitlines()), None)


def _read_cpu_info() -> dict[str, str]:
    """Return the fields of the first processor in /proc/cpuinfo."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return {}
    lines = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in lines}
