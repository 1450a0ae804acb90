"""Text of other libraries as part of a message: one line, without escape codes."""

from __future__ import annotations

import re

# Escape sequences of terminals (ECMA-48): colors and cursor, titles and links, and single ones.
_ESCAPES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b[@-_]?")
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f]+")
_MOST = 300


def plain_line(text: object, most: int | None = _MOST) -> str:
    """Return a text in one line without escape codes and control characters.

    Args:
        text: The text, or an error whose message it is.
        most: Number of characters after which it is cut, between words; None for no limit.
    """
    line = " ".join(_CONTROLS.sub(" ", _ESCAPES.sub("", str(text))).split())
    if most is None or len(line) <= most:
        return line
    return line[:most].rsplit(" ", 1)[0] + " ..."


def first_line(error: BaseException) -> str:
    """Return the first line of the message of an error, or the name of its class if it has none."""
    lines = [line for line in map(plain_line, str(error).splitlines()) if line]
    return lines[0] if lines else type(error).__name__


def counted(count: int, one: str) -> str:
    """Return a count with its noun, `1 image` or `1,024 images`."""
    return f"{count:,} {one}" if count == 1 else f"{count:,} {one}s"
