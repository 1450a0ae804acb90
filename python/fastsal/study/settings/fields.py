"""Reading tables of settings: which keys there are, of what type, and what else came."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastsal.errors import InvalidArgument
from fastsal.study.settings.toml_lines import Place, line_of

Choice = TypeVar("Choice", bound=str)


@dataclass(frozen=True)
class Reader:
    """A table of a settings file, and where it stands.

    Attributes:
        table: keys and values.
        place: of the table in the file.
        lines: `{place: line}`; empty where the settings come from no file.
        file: its name, for messages.
    """

    table: Mapping[str, Any]
    place: Place = ()
    lines: Mapping[Place, int] = field(default_factory=dict)
    file: str = "study"

    def error(self, key: str, came: str) -> InvalidArgument:
        """Return an error that names the key and the line."""
        place = (*self.place, key)
        line = line_of(self.lines, place)
        where = f"{self.file}, line {line}: " if line else f"{self.file}: "
        name = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in place).lstrip(".")
        return InvalidArgument(f"{where}{name}: {came}")

    def only(self, *known: str) -> None:
        """Raise InvalidArgument for a key that is none of these."""
        for key in self.table:
            if key not in known:
                close = difflib.get_close_matches(key, known, n=2, cutoff=0.6)
                hint = f" (close: {', '.join(close)})" if close else ""
                raise self.error(key, f"is an unknown key{hint}; takes {', '.join(known)}")

    def text(self, key: str, default: str | None = None) -> str:
        """A string; required without a default."""
        value = self._value(key, default)
        if not isinstance(value, str) or (not value and default is None):
            raise self.error(key, f"got {value!r}; takes a string")
        return value

    def optional_text(self, key: str) -> str | None:
        """A string, or None where there is none."""
        return self.text(key) if key in self.table else None

    def choice(self, key: str, known: Sequence[Choice], default: Choice) -> Choice:
        """One of some strings."""
        value = self.text(key, default)
        if value not in known:
            close = difflib.get_close_matches(value, known, n=1)
            hint = f" (close: {close[0]})" if close else ""
            raise self.error(key, f"got {value!r}{hint}; takes {', '.join(known)}")
        return next(each for each in known if each == value)  # the same text, of the narrower type

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self.error(key, f"got {value!r}; takes true or false")
        return value

    def count(self, key: str, default: int | None, least: int = 1) -> int:
        """A whole number."""
        value = self._value(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise self.error(key, f"got {value!r}; takes a whole number, {least} or more")
        return value

    def optional_count(self, key: str, least: int = 1) -> int | None:
        """A whole number, or None where there is none."""
        return self.count(key, None, least) if key in self.table else None

    def number(
        self,
        key: str,
        default: float | None,
        accepts: Callable[[float], bool],
        takes: str,
    ) -> float:
        """A number that a function accepts."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not accepts(value):
            raise self.error(key, f"got {value!r}; takes {takes}")
        return float(value)

    def share(self, key: str, default: float | None) -> float:
        """A number from 0 to 1."""
        return self.number(key, default, lambda v: 0 <= v <= 1, "a share from 0 to 1")

    def shares(self, key: str) -> list[float]:
        """One or more different numbers from 0 to 1."""
        values = self._list(key, None)
        for value in values:
            if (
                isinstance(value, bool)
                or not isinstance(value, (int, float))
                or not 0 <= value <= 1
            ):
                raise self.error(key, f"got {value!r}; takes shares from 0 to 1")
        return self._different(key, [float(v) for v in values])

    def counts(self, key: str, default: list[int], least: int = 0) -> list[int]:
        """One or more different whole numbers."""
        values = self._list(key, default)
        for value in values:
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise self.error(key, f"got {value!r}; takes whole numbers, {least} or more")
        return self._different(key, values)

    def names(self, key: str, default: list[str] | None = None) -> list[str]:
        """One string or more."""
        value = self._value(key, default)
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list) or not all(isinstance(v, str) and v for v in values):
            raise self.error(key, f"got {value!r}; takes a string, or a list of them")
        return self._different(key, values)

    def tables(self, key: str) -> list[Reader]:
        """The tables of `[[key]]`, in order; none where there are none."""
        value = self.table.get(key, [])
        if not isinstance(value, list) or not all(isinstance(v, Mapping) for v in value):
            raise self.error(key, f"takes tables, [[{key}]]")
        return [
            Reader(v, (*self.place, key, i), self.lines, self.file) for i, v in enumerate(value)
        ]

    def within(self, key: str) -> Reader:
        """The table of `[key]`; empty where there is none."""
        value = self.table.get(key, {})
        if not isinstance(value, Mapping):
            raise self.error(key, f"takes a table, [{key}]")
        return Reader(value, (*self.place, key), self.lines, self.file)

    def _value(self, key: str, default: Any) -> Any:
        value = self.table.get(key, default)
        if value is None:
            raise self.error(key, "is missing")
        return value

    def _list(self, key: str, default: list[Any] | None) -> list[Any]:
        value = self._value(key, default)
        if not isinstance(value, list) or not value:
            raise self.error(key, f"got {value!r}; takes a list of one or more")
        return value

    def _different(self, key: str, values: list[Any]) -> list[Any]:
        if len(set(values)) != len(values):
            raise self.error(key, f"got {values}; takes each once")
        return values
