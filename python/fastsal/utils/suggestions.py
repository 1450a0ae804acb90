"""Names in error messages: choices, suggestions for misspelled ones, and short lists."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Sequence

from fastsal.errors import InvalidArgument

_NAMED = 5  # names that `listed` shows before it counts the rest


def listed(names: Sequence[str], most: int = _NAMED) -> str:
    """Join names with commas; those after the first `most` are only counted."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def closest(name: object, known: Iterable[str], n: int = 3, cutoff: float = 0.6) -> list[str]:
    """Return the known names that are most similar to `name`, best first.

    Args:
        name: What was given; anything but a string has no similar name.
        known: Valid names.
        n: Largest number of names to return.
        cutoff: Least similarity, 0 to 1 (see `difflib.get_close_matches`).
    """
    if not isinstance(name, str):
        return []
    return difflib.get_close_matches(name, list(known), n=n, cutoff=cutoff)


def did_you_mean(name: object, known: Iterable[str], n: int = 3, cutoff: float = 0.6) -> str:
    """Return `"; did you mean 'a' or 'b'?"` to end a message with; empty without a similar name."""
    near = [repr(each) for each in closest(name, known, n, cutoff)]
    return f"; did you mean {' or '.join(near)}?" if near else ""


def check_choice(argument: str, value: object, choices: Collection[str]) -> None:
    """Raise InvalidArgument unless `value` is one of `choices`.

    The message lists the choices and suggests the most similar one.
    """
    if not isinstance(value, str) or value not in choices:
        options = " or ".join(", ".join(map(repr, choices)).rsplit(", ", 1))
        raise InvalidArgument(
            f"{argument} must be {options}, got {value!r:.80}{did_you_mean(value, choices, n=1)}"
        )
