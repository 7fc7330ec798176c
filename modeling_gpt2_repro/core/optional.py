"""Narrowing of optional values."""

from typing import TypeVar

Value = TypeVar("Value")


def not_none(value: Value | None) -> Value:
    """Return `value`, which the caller knows to be set, as type checkers cannot.

    Raises:
        TypeError: it is `None`, a bug of the caller.
    """
    if value is None:
        raise TypeError("an optional value is not set")
    return value
