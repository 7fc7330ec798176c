"""Messages as a single line that is safe to print on a terminal."""

from modeling_gpt2_repro.core.errors import escape_controls, format_line


def test_control_characters_are_escaped():
    assert escape_controls("\x1b[31m\x07\r\t\x9b\u202e\u200b\x00\ud800\u2028") == (
        r"\x1b[31m\x07\r\t\x9b\u202e\u200b\x00\ud800\u2028"
    )
    plain = 'naïve 日本語 🙂 it\'s \\ "x"\n\n  y'
    assert escape_controls(plain) == plain


def test_a_message_is_one_line_without_controls_and_keeps_both_ends():
    assert format_line(" two\n lines,\ta \x1b[31m colour ") == r"two lines, a \x1b[31m colour"
    line = format_line("begin " + "x" * 10_000 + " end")
    assert len(line) < 1600 and line.startswith("begin x") and line.endswith("x end")
