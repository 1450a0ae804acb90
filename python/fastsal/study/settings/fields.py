"""Typed reading of settings tables, with errors that name the key and its line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastsal.errors import InvalidArgument
from fastsal.study.settings.toml_lines import Place, line_of
from fastsal.utils.numbers import real, whole
from fastsal.utils.suggestions import check_choice, did_you_mean

Choice = TypeVar("Choice", bound=str)


@dataclass(frozen=True)
class Reader:
    """A table of a settings file with its position in the file.

    Attributes:
        table: Keys and values.
        place: Path of keys to the table.
        lines: `{place: line number, from 1}`; empty if the settings do not come from a file.
        file: Name of the file, for error messages.
    """

    table: Mapping[str, Any]
    place: Place = ()
    lines: Mapping[Place, int] = field(default_factory=dict)
    file: str = "study"

    def error(self, key: str, problem: str) -> InvalidArgument:
        """Return an error `file, line N: name problem` about a key of this table."""
        return InvalidArgument(f"{self._where(key)}{self._name(key)} {problem}")

    def only(self, *known: str) -> None:
        """Raise InvalidArgument if the table has a key that is not in `known`."""
        for key in self.table:
            if key not in known:
                hint = did_you_mean(key, known, n=2)
                raise self.error(key, f"is an unknown key{hint} (keys: {', '.join(known)})")

    def text(self, key: str, default: str | None = None) -> str:
        """Return a string; it is required if `default` is None."""
        value = self._value(key, default)
        if not isinstance(value, str) or (not value and default is None):
            raise self.error(key, f"must be a non-empty string, got {value!r}")
        return value

    def optional_text(self, key: str) -> str | None:
        """Return a string, or None if the key is absent."""
        return self.text(key) if key in self.table else None

    def choice(self, key: str, known: Sequence[Choice], default: Choice | None) -> Choice:
        """Return one of the strings in `known`; it is required if `default` is None."""
        value = self._value(key, default)
        try:
            check_choice(self._name(key), value, known)
        except InvalidArgument as error:
            raise self._located(key, error) from None
        return next(each for each in known if each == value)  # the same text, of the narrower type

    def flag(self, key: str, default: bool) -> bool:
        """Return a boolean."""
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self.error(key, f"must be true or false, got {value!r}")
        return value

    def count(self, key: str, default: int | None, least: int = 1, most: int | None = None) -> int:
        """Return an integer in range; it is required if `default` is None."""
        value = self._value(key, default)
        try:
            return whole(self._name(key), value, least, most)
        except InvalidArgument as error:
            raise self._located(key, error) from None

    def optional_count(self, key: str, least: int = 1) -> int | None:
        """Return an integer, or None if the key is absent."""
        return self.count(key, None, least) if key in self.table else None

    def number(
        self,
        key: str,
        default: float | None,
        *,
        least: float | None = None,
        above: float | None = None,
        most: float | None = None,
        below: float | None = None,
    ) -> float:
        """Return a finite number in range; it is required if `default` is None.

        The bounds are those of `fastsal.utils.numbers.real`.
        """
        value = self._value(key, default)
        try:
            return real(self._name(key), value, least=least, above=above, most=most, below=below)
        except InvalidArgument as error:
            raise self._located(key, error) from None

    def fractions(self, key: str) -> list[float]:
        """Return one or more distinct numbers in [0, 1]."""
        values = self._list(key, None)
        try:
            found = [real(self._name(key), value, least=0, most=1) for value in values]
        except InvalidArgument as error:
            raise self._located(key, error) from None
        return self._distinct(key, found)

    def counts(
        self, key: str, default: list[int] | None, least: int = 0, most: int | None = None
    ) -> list[int]:
        """Return one or more distinct integers in range."""
        values = self._list(key, default)
        try:
            found = [whole(self._name(key), value, least, most) for value in values]
        except InvalidArgument as error:
            raise self._located(key, error) from None
        return self._distinct(key, found)

    def names(self, key: str, default: list[str] | None = None) -> list[str]:
        """Return one or more distinct strings; a single string counts as a list of one."""
        value = self._value(key, default)
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list) or not all(isinstance(v, str) and v for v in values):
            raise self.error(key, f"must be a string or a list of strings, got {value!r}")
        return self._distinct(key, values)

    def tables(self, key: str) -> list[Reader]:
        """Return the tables of `[[key]]` in order; empty if there are none."""
        value = self.table.get(key, [])
        if not isinstance(value, list) or not all(isinstance(v, Mapping) for v in value):
            raise self.error(key, f"must be an array of tables, [[{key}]]")
        return [
            Reader(v, (*self.place, key, i), self.lines, self.file) for i, v in enumerate(value)
        ]

    def within(self, key: str) -> Reader:
        """Return the table of `[key]`; an empty one if it is absent."""
        value = self.table.get(key, {})
        if not isinstance(value, Mapping):
            raise self.error(key, f"must be a table, [{key}]")
        return Reader(value, (*self.place, key), self.lines, self.file)

    def _value(self, key: str, default: Any) -> Any:
        value = self.table.get(key, default)
        if value is None:
            raise self.error(key, "is missing")
        return value

    def _list(self, key: str, default: list[Any] | None) -> list[Any]:
        value = self._value(key, default)
        if not isinstance(value, list) or not value:
            raise self.error(key, f"must be a non-empty list, got {value!r}")
        return value

    def _distinct(self, key: str, values: list[Any]) -> list[Any]:
        if len(set(values)) != len(values):
            raise self.error(key, f"must hold distinct values, got {values}")
        return values

    def _located(self, key: str, error: InvalidArgument) -> InvalidArgument:
        """Prefix an error that begins with the name of the key with its file and line."""
        return InvalidArgument(f"{self._where(key)}{error}")

    def _where(self, key: str) -> str:
        line = line_of(self.lines, (*self.place, key))
        return f"{self.file}, line {line}: " if line else f"{self.file}: "

    def _name(self, key: str) -> str:
        place = (*self.place, key)
        return "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in place).lstrip(".")
