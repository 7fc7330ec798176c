"""The files of results: what is in them, and measurements that fail or are cut short."""

import argparse
import json
import time

import pytest

from benchmarks import measurements
from benchmarks.measurements import (
    Figure,
    Omission,
    Recorder,
    Report,
    describe_command,
    describe_machine,
    find_hellaswag,
    format_table,
    read_entries,
    read_results,
)


def test_a_failing_measurement_does_not_stop_the_next(tmp_path, capsys):
    recorder = Recorder("speed", tmp_path / "entries", seconds=60, predicted={("second", "ms"): 2.0})

    def fail() -> dict[str, float]:
        raise RuntimeError("no such kernel\nsecond line")

    recorder.measure("first", fail)
    recorder.measure("second", lambda: {"ms": 3, "GB": 0.5})
    assert list(read_entries(tmp_path / "entries")) == [
        Omission("speed", "first", "RuntimeError: no such kernel"),
        Figure("speed", "second", 3.0, "ms", predicted=2.0),
        Figure("speed", "second", 0.5, "GB"),
    ]
    assert "Traceback" in capsys.readouterr().err


def test_a_measurement_too_long_for_the_deadline_is_omitted(tmp_path):
    recorder = Recorder("speed", tmp_path / "entries", seconds=10, predicted={})
    recorder.measure("long", lambda: pytest.fail("was begun"), expected_seconds=20)
    recorder.measure("short", lambda: {"ms": 1}, expected_seconds=5)
    omission, figure = read_entries(tmp_path / "entries")
    assert omission.subject == "long" and "left out" in omission.reason and figure.subject == "short"
    assert recorder.seconds_left < 10


def test_only_matching_measurements_are_made(tmp_path):
    recorder = Recorder("speed", tmp_path / "entries", seconds=60, predicted={}, only="first|eager")
    for name in ("step, first", "step, last", "validation, eager"):
        recorder.measure(name, lambda: {"ms": 1})
    assert [entry.subject for entry in read_entries(tmp_path / "entries")] == ["step, first", "validation, eager"]


def test_a_part_without_entries_yields_none(tmp_path):
    assert list(read_entries(tmp_path / "missing")) == []


@pytest.fixture
def report(tmp_path) -> Report:
    report = Report("example", argparse.Namespace(rounds=3, data_dir=str(tmp_path / "shards"), output=tmp_path))
    report.add_median("a", "fast", [3.0, 1.0, 2.0], "s")
    report.add_median("a", "slow", [4.0, 5.0, 9.0], "s")
    report.add("b", "slow", 7, "s")
    report.add("a", "fast", 8, "GB")
    report.omit("a", "absent", "not installed")
    report.notes["fast"] = "leaves out checks"
    return report


def test_a_report_reads_back_with_its_machine(report, tmp_path):
    report.write(tmp_path / "new" / "x.json")
    content, figures, omissions = read_results(tmp_path / "new" / "x.json")
    assert (figures, omissions) == (report.figures, report.omissions)
    assert figures[0] == Figure("a", "fast", 2.0, "s", "median of 3", 1.0, 3.0)
    assert omissions == [Omission("a", "absent", "not installed")]
    assert content["notes"] == {"fast": "leaves out checks"}
    assert content["settings"] == {"rounds": 3, "data_dir": "shards"}  # no folders of this machine
    assert content["machine"]["cores"] >= 1 and content["machine"]["memory_gib"] > 0
    assert content["versions"]["torch"] and content["commit"]
    assert time.strftime("%Y") <= content["date"][:4]
    (tmp_path / "old.json").write_text(json.dumps(content | {"schema": 1}))
    with pytest.raises(ValueError, match="schema 1"):
        read_results(tmp_path / "old.json")


def test_ratios_are_of_the_same_part_and_unit(report):
    report.compare("a", "fast", "slow", "absent")
    assert [figure.ratios for figure in report.figures] == [{"slow": 2 / 5}, {}, {}, {}]


def test_the_command_repeats_the_benchmark_anywhere():
    argv = ["/a/b/bench_x.py", "--output", "/c/d.json", "--rounds", "3", "--data_file=/e/f.jsonl", "--output=/g"]
    assert describe_command(argv) == "python benchmarks/bench_x.py --rounds 3 --data_file=f.jsonl"


def test_the_machine_lists_its_instruction_sets(monkeypatch):
    cpu_info = {"model name": "CPU", "flags": "fpu avx2 avx512_bf16"}
    monkeypatch.setattr(measurements, "_read_cpu_info", lambda: cpu_info)
    monkeypatch.setattr(measurements, "_ask", lambda *command: "H100, 81559 MiB, 580" if "smi" in command[0] else None)
    machine = describe_machine()
    assert machine["cpu"] == "CPU" and machine["instruction_sets"] == ["avx2", "avx512_bf16"]
    assert machine["gpu"]["name"] == "H100" and machine["gpu"]["memory"] == "81559 MiB"


def test_hellaswag_is_the_users_file_or_the_fallback(monkeypatch, tmp_path):
    monkeypatch.setattr(measurements, "HELLASWAG_FILES", (tmp_path / "a", tmp_path / "b"))
    assert find_hellaswag(tmp_path / "sample") == tmp_path / "sample"
    (tmp_path / "b").touch()
    assert find_hellaswag(tmp_path / "sample") == tmp_path / "b"


def test_the_table_has_a_line_per_figure_and_omissions_last():
    figure = Figure("a", "step", 12345.678, "tokens/s", ratios={"peer": 1.5}, predicted=12000.0)
    header, row, omission = format_table([figure], [Omission("b", "whole", "killed")]).splitlines()
    assert header.split() == ["part", "subject", "value", "unit", "statistic", "predicted", "ratios"]
    assert row.split() == ["a", "step", "12,346", "tokens/s", "12,000", "1.5", "x", "peer"]
    assert omission.startswith("NOT MEASURED") and "killed" in omission
