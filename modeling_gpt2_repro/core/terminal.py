"""Text that fits a terminal."""

import shutil
import sys
import unicodedata
from collections.abc import Iterable, Iterator

# Of an output that is not a terminal.
DEFAULT_COLUMNS = 80


def get_columns() -> int:
    """Return the width of the terminal that stdout is, or 80."""
    return shutil.get_terminal_size((DEFAULT_COLUMNS, 24)).columns


def count_columns(text: str) -> int:
    """Return how many columns a terminal uses for a text: two for wide characters, none for combining ones."""
    return sum(
        0 if unicodedata.combining(character) else 2 if unicodedata.east_asian_width(character) in "WF" else 1
        for character in text
    )


def wrap_text(line: str, columns: int, indent: str = "") -> list[str]:
    """Break a line between words, or inside words that are too long, into lines of at most `columns` columns.

    `indent` begins all lines but the first. Spaces between words are kept, except those at a break.
    """
    lines, room = [""], columns
    for number, word in enumerate(line.split(" ")):
        candidate = f"{lines[-1]} {word}" if number else word
        if count_columns(candidate) <= room:
            lines[-1] = candidate
        elif word:
            room = max(columns - count_columns(indent), 1)
            lines += _break_word(word, room)
    first, *others = (each.rstrip() for each in lines)
    return [first, *(indent + each.lstrip() for each in others)]


def fit_lines(lines: Iterable[str], indent: str = "  ") -> list[str]:
    """Wrap lines if stdout is a terminal; a log or a pipe gets them whole."""
    if not sys.stdout.isatty():
        return list(lines)
    return [part for line in lines for part in wrap_text(line, get_columns(), indent)]


def _break_word(word: str, room: int) -> Iterator[str]:
    """Yield a word in pieces of at most `room` columns, or of a single character."""
    piece = ""
    for character in word:
        if piece and count_columns(piece + character) > room:
            yield piece
            piece = ""
        piece += character
    yield piece
