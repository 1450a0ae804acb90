"""Types of option values; an invalid value is answered by "must be X, got Y"."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from fastsal.utils.devices import DEVICE_KINDS, is_device_name


class Integer(click.ParamType):  # type: ignore[type-arg]  # generic in recent click only
    """An integer, optionally with a lower bound and, beside it, an upper one."""

    name = "integer"

    def __init__(self, least: int | None = None, most: int | None = None) -> None:
        self.least, self.most = least, most

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the integer that `value` is or spells."""
        try:
            number = int(value)
        except ValueError:
            number = None
        is_small = number is None or (self.least is not None and number < self.least)
        if number is None or is_small or (self.most is not None and number > self.most):
            bound = "" if self.least is None else f" of at least {self.least}"
            bound = bound if self.most is None else f" in [{self.least}, {self.most}]"
            self.fail(f"must be an integer{bound}, got {shown(value)}", param, ctx)
        return number


class Number(click.ParamType):  # type: ignore[type-arg]
    """A floating-point number, optionally within closed bounds."""

    name = "number"

    def __init__(self, least: float = -math.inf, most: float = math.inf) -> None:
        self.least, self.most = least, most

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Return the number that `value` is or spells."""
        try:
            number = float(value)
        except ValueError:
            number = None
        is_bounded = (self.least, self.most) != (-math.inf, math.inf)
        if number is None or (is_bounded and not self.least <= number <= self.most):
            bounds = f" in [{self.least:g}, {self.most:g}]" if is_bounded else ""
            self.fail(f"must be a number{bounds}, got {shown(value)}", param, ctx)
        return number


class Sparsities(Number):
    """A fraction, or names or patterns of parameters with fractions: `PATTERN=FRACTION,...`."""

    name = "fraction"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the number, or the dict of numbers, that `value` is or spells."""
        if not isinstance(value, str) or "=" not in value:
            return super().convert(value, param, ctx)
        found: dict[str, float] = {}
        for entry in value.split(","):
            pattern, _, fraction = (part.strip() for part in entry.rpartition("="))
            if not pattern or pattern in found:
                self.fail(f"must be PATTERN=FRACTION,..., got {shown(value)}", param, ctx)
            found[pattern] = super().convert(fraction, param, ctx)
        return found


class Text(click.ParamType):  # type: ignore[type-arg]
    """A text that is not empty, as that of a variable that is not set is."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return `value`."""
        if not value:
            self.fail(f"must not be empty, got {value!r}", param, ctx)
        return str(value)


class FilePath(click.Path):
    """A path, with `~` as in a shell; an empty one is not the current folder."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return `value` as a path."""
        if value == "":
            self.fail("must be a path, got ''", param, ctx)
        return super().convert(os.path.expanduser(value), param, ctx)


class Choice(click.Choice):  # type: ignore[type-arg]
    """One of a few names."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return `value`, which must be one of the names."""
        try:
            return str(super().convert(value, param, ctx))
        except click.BadParameter:
            self.fail(f"must be one of {', '.join(self.choices)}, got {value!r}", param, ctx)


class Registered(Choice):
    """One of a few names, or another one that the file of the model may define."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return `value`; unknown names are checked once the model is loaded."""
        return super().convert(value, param, ctx) if value in self.choices else str(value)


def choice(names: Sequence[str]) -> Choice:
    """Return the type of an option that takes one of `names`."""
    return Choice(list(names))


def parse_size(
    ctx: click.Context, param: click.Parameter, value: str | None
) -> tuple[int, int] | str | None:
    """Parse `96`, `64x96` (height x width), `native`, `train` or `test`."""
    if value in (None, "native", "train", "test"):
        return value
    parts = value.lower().split("x")
    if len(parts) > 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise click.BadParameter(
            "must be pixels as 96, height x width as 64x96, or native, train or test, got "
            f"{value!r}",
            ctx,
            param,
        )
    return int(parts[0]), int(parts[-1])


def parse_numbers(
    ctx: click.Context, param: click.Parameter, value: str | None
) -> list[float] | None:
    """Parse numbers separated by commas."""
    if value is None:
        return None
    try:
        return [float(part) for part in value.split(",")]
    except ValueError:
        raise click.BadParameter(
            f"must be numbers separated by commas, for example 0.5,0.5,0.5, got {value!r}",
            ctx,
            param,
        ) from None


def shown(value: object) -> str:
    """Return a value as a message shows it: numbers bare, other text quoted."""
    try:
        float(str(value))
    except ValueError:
        return repr(value)
    return str(value)


class Device(click.ParamType):  # type: ignore[type-arg]
    """The name of a device; whether it exists is checked when it is used."""

    name = "device"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return `value` if it has the form of a device name."""
        if not is_device_name(value):
            self.fail(f"must be {DEVICE_KINDS}, got {value!r}", param, ctx)
        return str(value)


PATH = FilePath(path_type=Path)
TEXT = Text()
COUNT = Integer(least=1)
THREADS = Integer(least=1, most=2**16)
SEED = Integer(least=0, most=2**63 - 1)  # what both NumPy and PyTorch accept
NUMBER = Number()
SPARSITY = Sparsities()
