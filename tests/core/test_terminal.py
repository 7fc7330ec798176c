"""Wrapping text to a terminal's width."""

import pytest

from modeling_gpt2_repro.core.terminal import count_columns, fit_lines, get_columns, wrap_text


def test_a_line_is_broken_between_words_and_indented():
    assert wrap_text("one two three four", 10, "    ") == ["one two", "    three", "    four"]
    assert wrap_text("label  one  two   three", 12, "    ") == ["label  one", "    two", "    three"]
    assert wrap_text("", 12) == [""]


@pytest.mark.parametrize("columns", [5, 7, 20])
def test_no_line_is_wider_than_the_terminal(columns):
    text = "a word, averyveryverylongword 小さな船が港に入る e\u0301e\u0301e\u0301e\u0301 end"
    lines = wrap_text(text, columns, "  ")
    assert max(map(count_columns, lines)) <= columns
    assert "".join("".join(lines).split()) == "".join(text.split())


def test_output_that_is_not_a_terminal_has_80_columns(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr("sys.__stdout__", None)
    assert get_columns() == 80
    monkeypatch.setenv("COLUMNS", "120")
    assert get_columns() == 120


def test_only_a_terminal_gets_wrapped_lines(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "10")
    lines = ["one two three", "four"]
    assert fit_lines(lines) == lines
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert fit_lines(lines, " ") == ["one two", " three", "four"]
