"""Mistakes of the caller that one line explains."""

from __future__ import annotations

__all__ = ["InputError", "first_line", "shortened"]

_LONGEST = 200


class InputError(Exception):
    """An option of the command line (or the argument of that name) is not what was expected.

    Args:
        option: its name, without dashes.
        message: what was expected and what came, in one line.
    """

    exit_code = 2

    def __init__(self, option: str, message: str) -> None:
        super().__init__(f"--{option.replace('_', '-')}: {message}")
        self.option = option


def first_line(error: BaseException) -> str:
    """The first line of what ``error`` says, or its type where it says nothing."""
    text = str(error).strip()
    return text.splitlines()[0].rstrip(". ") if text else type(error).__name__


def shortened(name: object) -> str:
    """``name``, or its beginning if it is too long for a message, as a ``data:`` URL in place of a path is."""
    text = str(name)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
