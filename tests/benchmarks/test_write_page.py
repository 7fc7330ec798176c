"""docs/benchmarks.md: its tables are those of the files of results."""

import argparse
from pathlib import Path

import pytest

from benchmarks.measurements import RESULTS, Report
from benchmarks.write_page import MARKERS, PAGE, build_page
from modeling_gpt2_repro.core.errors import UserError

TEMPLATE = "Text.\n<!-- machines -->\nold\n<!-- end -->\nMore.\n<!-- figures: example -->\n<!-- end -->\nEnd.\n"


def write_report(path: Path, gpu: dict | None = None) -> None:
    report = Report("example", argparse.Namespace(tokens=[1e7, 1e8], rounds=3))
    report.environment["command"] = "python benchmarks/bench_example.py --rounds 3"
    report.environment["machine"]["gpu"] = gpu
    report.add_median("small", "fast", [1.0, 2.0, 4.0], "tokens/s")
    report.add("small", "fast", 0.5, "GB", predicted=0.25)
    report.add_median("small", "slow", [1.0, 1.0, 1.0], "tokens/s")
    report.compare("small", "fast", "slow")
    report.omit("all", "absent", "not installed")
    report.notes["slow"] = "leaves out checks"
    report.write(path)


def test_the_page_is_what_the_results_give():
    page = PAGE.read_text(encoding="utf-8")
    assert build_page(page, RESULTS) == page, "run benchmarks/write_page.py"


def test_every_benchmark_has_a_section():
    known = {name.removeprefix("figures: ") for _, name, _ in MARKERS.findall(PAGE.read_text(encoding="utf-8"))}
    scripts = (RESULTS.parent).glob("bench_*.py")
    assert known == {path.stem.removeprefix("bench_") for path in scripts} | {"gpu", "machines"}


def test_a_row_has_the_result_its_peers_the_machine_and_the_command(tmp_path):
    write_report(tmp_path / "example.json")
    page = build_page(TEMPLATE, tmp_path)
    row = (
        "| small: fast | 2 tokens/s (median of 3, 1 to 4); 0.5 GB (predicted 0.25) | slow: 2 x in tokens/s | A |\n"
        "| small: slow | 1 tokens/s (median of 3) |  | A |\n"
    )
    assert row in page
    assert "`python benchmarks/bench_example.py --rounds 3`" in page
    assert "tokens 1e+07 1e+08, rounds 3" in page
    assert "- slow: leaves out checks\n- not measured: all, absent: not installed\n" in page
    assert page.startswith("Text.\n") and "More.\n" in page and page.endswith("End.\n") and "old" not in page
    assert build_page(page, tmp_path) == page


def test_machines_are_lettered_in_order(tmp_path):
    write_report(tmp_path / "a.json")
    write_report(tmp_path / "b.json", gpu={"name": "H100", "count": 8})
    write_report(tmp_path / "c.json")
    page = build_page(TEMPLATE, tmp_path)
    assert page.count("Machine [A](#machines)") == 2 and page.count("Machine [B](#machines)") == 1
    (row,) = (line for line in page.splitlines() if line.startswith("| B |"))
    assert row.endswith("| 8 x H100 |")


def test_without_results_a_section_has_no_record(tmp_path):
    assert "<!-- figures: example -->\nNo record yet.\n<!-- end -->" in build_page(TEMPLATE, tmp_path)


def test_results_without_a_section_are_an_error(tmp_path):
    write_report(tmp_path / "example.json")
    with pytest.raises(UserError, match="example"):
        build_page("<!-- machines -->\n<!-- end -->", tmp_path)
