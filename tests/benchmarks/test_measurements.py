"""What benchmarks write down, also of measurements that fail and of parts that are cut short."""

import json
import time

import pytest

from benchmarks import measurements
from benchmarks.measurements import (
    Failure,
    Recorder,
    Result,
    describe_machine,
    format_table,
    read_entries,
    read_results,
)


def test_a_measurement_that_fails_costs_no_other(tmp_path, capsys):
    recorder = Recorder("speed", tmp_path / "entries", seconds=60, predicted={("second", "ms"): 2.0})

    def fail() -> dict[str, float]:
        raise RuntimeError("no such kernel\nsecond line")

    recorder.measure("first", fail)
    recorder.measure("second", lambda: {"ms": 3, "GB": 0.5})
    assert list(read_entries(tmp_path / "entries")) == [
        Failure("speed", "first", "RuntimeError: no such kernel"),
        Result("speed", "second", 3.0, "ms", predicted=2.0),
        Result("speed", "second", 0.5, "GB"),
    ]
    assert "Traceback" in capsys.readouterr().err


def test_what_the_deadline_leaves_no_time_for_is_left_out_and_said(tmp_path):
    recorder = Recorder("speed", tmp_path / "entries", seconds=10, predicted={})
    recorder.measure("long", lambda: pytest.fail("was begun"), expected_seconds=20)
    recorder.measure("short", lambda: {"ms": 1}, expected_seconds=5)
    failure, result = read_entries(tmp_path / "entries")
    assert failure.name == "long" and "left out" in failure.error and result.name == "short"
    assert recorder.seconds_left < 10


def test_only_what_is_asked_for_is_measured(tmp_path):
    recorder = Recorder("speed", tmp_path / "entries", seconds=60, predicted={}, only="first|eager")
    for name in ("step, first", "step, last", "validation, eager"):
        recorder.measure(name, lambda: {"ms": 1})
    assert [entry.name for entry in read_entries(tmp_path / "entries")] == ["step, first", "validation, eager"]


def test_entries_of_a_part_that_wrote_none_are_none(tmp_path):
    assert list(read_entries(tmp_path / "missing")) == []


def test_a_file_of_results_is_read_back_and_names_its_machine(tmp_path):
    results = [Result("a", "step", 12345.678, "tokens/s", 12000.0), Result("a", "step", 0.5, "GB")]
    failures = [Failure("b", "whole", "ended with -9")]
    measurements.write_results(tmp_path / "new" / "x.json", "gpu", results, failures, describe_machine())
    content, *read = read_results(tmp_path / "new" / "x.json")
    assert read == [results, failures]
    assert content["benchmark"] == "gpu" and content["device"]["name"] and content["versions"]["torch"]
    assert time.strftime("%Y") <= content["date"][:4]
    (tmp_path / "old.json").write_text(json.dumps(content | {"schema": 0}))
    with pytest.raises(ValueError, match="schema 0"):
        read_results(tmp_path / "old.json")


def test_the_table_has_a_line_a_figure_and_names_failures_last():
    table = format_table([Result("a", "step", 12345.678, "tokens/s", 12000.0)], [Failure("b", "whole", "killed")])
    header, row, failure = table.splitlines()
    assert header.split() == ["part", "measurement", "value", "unit", "predicted"]
    assert row.split() == ["a", "step", "12,346", "tokens/s", "12,000"]
    assert failure.startswith("FAILED") and "killed" in failure
