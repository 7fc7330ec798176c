"""What a run prints."""

import io
import sys

import pytest

from modeling_gpt2_repro.training import console as console_module
from modeling_gpt2_repro.training.console import Console, format_duration

METRICS = {"train/loss": 3.14159, "train/lr": 6e-4, "train/grad_norm": 0.5, "train/tokens_per_second": 123456.0}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run_steps(console: Console, n_steps: int) -> None:
    console.start(0, n_steps)
    for step in range(1, n_steps + 1):
        console.show_step(step, METRICS)
    console.close()


def test_without_a_terminal_occasional_plain_lines_are_printed(capsys, monkeypatch):
    now = iter(range(0, 1000, 5))  # five seconds per step
    monkeypatch.setattr(console_module.time, "monotonic", lambda: next(now))
    run_steps(Console(enabled=True), 10)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["1/10", "4/10", "7/10", "10/10"]
    assert "loss 3.142  lr 6.0e-04  grad norm 0.50  123,456 tokens/s" in lines[0]
    assert lines[1].endswith("30 s left")


def test_a_terminal_shows_a_progress_bar(capsys, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    run_steps(Console(enabled=True), 3)
    shown = terminal.getvalue()
    assert "3/3" in shown and "loss 3.142" in shown and "123,456 tokens/s" in shown
    assert "\n" not in shown.rstrip("\n")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("columns", [80, 160])
def test_the_bar_fits_a_terminal_and_keeps_the_loss_and_the_rate(monkeypatch, columns):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", str(columns))
    console = Console(enabled=True)
    console.start(0, 19073)
    console.bar.dynamic_ncols = lambda _: (columns, 40)
    console.show_step(1, METRICS)
    console.bar.refresh()
    console.close()
    last = terminal.getvalue().rstrip("\n").split("\r")[-1]
    assert len(last) <= columns and last.rstrip().endswith("tokens/s]")
    assert "1/19073" in last and "loss 3.142" in last
    assert ("grad norm 0.50" in last) == (columns > 80)


def test_long_lines_are_wrapped_on_a_terminal_only(monkeypatch, capsys):
    line = "step        " + "many words " * 12
    monkeypatch.setenv("COLUMNS", "80")
    Console(enabled=True).say(line)
    assert capsys.readouterr().out == line + "\n"
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    Console(enabled=True).say(line)
    first, *others = terminal.getvalue().splitlines()
    assert others and all(len(each) <= 80 and each.startswith(" " * 12) for each in others)
    assert " ".join([first, *others]).split() == line.split()


def test_only_one_process_prints(capsys):
    console = Console(enabled=False)
    console.say("hello")
    run_steps(console, 3)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "seconds, text",
    [(45, "45 s"), (720, "12 min"), (3.4 * 3600, "3.4 h"), (11 * 86400, "11 days"), (876.6 * 86400, "2.4 years")],
)
def test_durations_are_formatted_for_people(seconds, text):
    assert format_duration(seconds) == text
