"""What every benchmark writes down: its figures, and the machine that they are of, as one JSON schema.

{"schema": 1, "benchmark": "gpu", "date": "...", "commit": "...", "arguments": [...],
 "device": {"name": ..., "memory": ..., "driver": ..., "cpu": ..., "cores": ...}, "versions": {...},
 "results": [{"part": ..., "name": ..., "value": ..., "unit": ..., "predicted": ...}],
 "failures": [{"part": ..., "name": ..., "error": ...}]}
"""

import gc
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from modeling_gpt2_repro.core.devices import count_cores, list_versions
from modeling_gpt2_repro.core.files import write_json

SCHEMA = 1
RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Result:
    """One figure. `predicted` is what it was expected to be before anything ran, where something was."""

    part: str
    name: str
    value: float
    unit: str
    predicted: float | None = None


@dataclass(frozen=True)
class Failure:
    """A measurement that could not be made, and the first line of why."""

    part: str
    name: str
    error: str


class Recorder:
    """Makes the measurements of a part until its deadline, and writes each down at once for `read_entries`.

    Args:
        seconds: until the deadline.
        predicted: values by measurement and unit.
        only: a regular expression found in the names of what is measured; of the rest nothing is.
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
        """Make a measurement, which returns values by their unit; what goes wrong in it is noted as its failure."""
        if not re.search(self.only, name):
            return None
        if expected_seconds > self.seconds_left:
            return self.note_failure(name, f"left out: {self.seconds_left:.0f} s were left")
        started = time.monotonic()
        try:
            for unit, value in measurement().items():
                self._write(Result(self.part, name, float(value), unit, self.predicted.get((name, unit))))
        except Exception as error:
            traceback.print_exc()
            reason = next(iter(str(error).strip().splitlines()), "")
            self.note_failure(name, f"{type(error).__name__}: {reason}")
        free_memory()
        print(f"{self.part}: {name}, {time.monotonic() - started:.1f} s", flush=True)

    def note_failure(self, name: str, reason: str) -> None:
        """Write down what could not be measured."""
        self._write(Failure(self.part, name, reason[:300]))

    def _write(self, entry: Result | Failure) -> None:
        with open(self.path, "a", encoding="utf-8") as stream:
            stream.write(json.dumps([type(entry).__name__, vars(entry)]) + "\n")


def free_memory() -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def synchronize(device: torch.device) -> None:
    """Wait for what a device still computes."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_ms(function: Callable[[], object], device: torch.device, rounds: int) -> float:
    """Return the median milliseconds of a call on the device, after two that warm up."""
    times = []
    for number in range(rounds + 2):
        synchronize(device)
        started = time.perf_counter()
        function()
        synchronize(device)
        if number >= 2:
            times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times)


def read_entries(path: Path) -> Iterator[Result | Failure]:
    """Yield what a part wrote down, also of one that did not end well."""
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        kind, content = json.loads(line)
        yield {"Result": Result, "Failure": Failure}[kind](**content)


def describe_machine() -> dict[str, Any]:
    """Return `device`, `versions`, `commit` and `date` of a file of results."""
    device: dict[str, Any] = {"name": "cpu", "cpu": _read_cpu_name(), "cores": count_cores()}
    # Not asked of torch, which would keep a context on the device for it.
    if row := _ask("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"):
        name, memory, driver = row.split(", ")
        device |= {"name": name, "memory": memory, "driver": driver, "gpus": torch.cuda.device_count()}
    elif torch.cuda.is_available():
        device |= {"name": torch.cuda.get_device_name(0), "gpus": torch.cuda.device_count()}
    versions = list_versions() | {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _ask("git", "-C", str(RESULTS.parent), "rev-parse", "HEAD"),
        "device": device,
        "versions": versions,
    }


def write_results(
    path: Path, benchmark: str, results: Sequence[Result], failures: Sequence[Failure], machine: dict[str, Any]
) -> None:
    """Write a file of results, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"schema": SCHEMA, "benchmark": benchmark, **machine, "arguments": sys.argv[1:]}
    content |= {"results": [asdict(result) for result in results], "failures": [asdict(each) for each in failures]}
    write_json(path, content)


def format_table(results: Sequence[Result], failures: Sequence[Failure]) -> str:
    """Lay figures out one a line, what was predicted beside them, and what failed below."""
    rows = [("part", "measurement", "value", "unit", "predicted")]
    for each in results:
        predicted = "" if each.predicted is None else format_number(each.predicted)
        rows.append((each.part, each.name, format_number(each.value), each.unit, predicted))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if column in (2, 4) else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([*lines, *(f"FAILED  {each.part}  {each.name}: {each.error}" for each in failures)])


def format_number(value: float) -> str:
    """Return a number with three or four digits that count."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _ask(*command: str) -> str | None:
    """Return the first line that a command prints, `None` where there is no such command."""
    try:
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return next(iter(output.splitlines()), None)


def _read_cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as stream:
            return next(line.split(":", 1)[1].strip() for line in stream if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def read_results(path: str | os.PathLike) -> tuple[dict[str, Any], list[Result], list[Failure]]:
    """Read a file of results: all of it, and its figures and failures.

    Raises:
        ValueError: it is of another schema.
    """
    content = json.loads(Path(path).read_text(encoding="utf-8"))
    if content.get("schema") != SCHEMA:
        raise ValueError(f"{path} has schema {content.get('schema')}, not {SCHEMA}")
    results = [Result(**result) for result in content["results"]]
    return content, results, [Failure(**failure) for failure in content["failures"]]
