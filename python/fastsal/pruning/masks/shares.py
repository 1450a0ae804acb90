"""A sparsity for each pattern of names: the parameters of a pattern are ranked on their own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from fastsal.errors import InvalidArgument, UnknownParameter
from fastsal.models.wrappers import plain_name
from fastsal.utils.numbers import real
from fastsal.utils.suggestions import did_you_mean

# Fraction of the weights, or name or pattern of parameters to the fraction of theirs.
Sparsity = float | Mapping[str, float]


def checked_sparsity(sparsity: Any) -> float | dict[str, float]:
    """Return a sparsity with plain numbers.

    Raises:
        InvalidArgument: A fraction is not in `[0, 1]`, or there is no pattern.
    """
    if not isinstance(sparsity, Mapping):
        return real("sparsity", sparsity, least=0, most=1)
    if not sparsity:
        raise InvalidArgument("sparsity must be a number or have at least one pattern, got {}")
    for pattern in sparsity:
        if not isinstance(pattern, str):
            raise InvalidArgument(f"sparsity must have names or patterns as keys, got {pattern!r}")
    return {
        pattern: real(f"sparsity[{pattern!r}]", fraction, least=0, most=1)
        for pattern, fraction in sparsity.items()
    }


def divided(sparsity: Mapping[str, float], names: Iterable[str]) -> dict[str, list[str]]:
    """Divide parameters among patterns.

    A parameter belongs to the key that is its name, or else to the first pattern that matches it.
    Parameters that none matches belong to no key.

    Args:
        sparsity: Name or `fnmatch` pattern to a fraction.
        names: Names of the parameters.

    Returns:
        Pattern to the names of its parameters, at least one.

    Raises:
        UnknownParameter: A pattern matches nothing.
        InvalidArgument: Other patterns come before one for all that it matches.
    """
    found: dict[str, list[str]] = {pattern: [] for pattern in sparsity}
    matched: set[str] = set()
    names = list(names)
    for name in names:
        fitting = [pattern for pattern in sparsity if _matches(pattern, name)]
        matched.update(fitting)
        if fitting:
            exact = [pattern for pattern in fitting if pattern == name]
            found[(exact or fitting)[0]].append(name)
    for pattern, own in found.items():
        if pattern not in matched:
            raise UnknownParameter(
                f"sparsity: {pattern!r} matches no parameter{did_you_mean(pattern, names)}"
            )
        if not own:
            raise InvalidArgument(
                f"sparsity: {pattern!r} must come before the patterns that match all of its "
                f"parameters, got {list(found)}"
            )
    return found


def _matches(pattern: str, name: str) -> bool:
    return any(fnmatchcase(name, each) for each in (pattern, plain_name(pattern)))
