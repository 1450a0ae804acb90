"""Parsed names of data sets, `library:name?key=value`, see `open_images`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fastsal.errors import FastsalError, InvalidArgument
from fastsal.utils.paths import user_path


@dataclass(frozen=True)
class DataName:
    """The parts of `library:name?key=value&key=value`.

    Attributes:
        spec: The whole text, for messages.
        library: "sklearn", "torchvision" or "hf".
        name: Name of the data set in the library.
        query: Key to value.
        root: Folder that relative paths refer to.
    """

    spec: str
    library: str
    name: str
    query: dict[str, str]
    root: Path

    @property
    def may_download(self) -> bool:
        """Whether the name contains `download=true`."""
        value = self.query.get("download", "false")
        if value not in ("true", "false"):
            raise InvalidArgument(
                f"data: download must be true or false, got {value!r} in {self.spec!r}"
            )
        return value == "true"

    def path(self, text: str) -> Path:
        """Return a path; a relative one is resolved against `root`."""
        return self.root / user_path(text)


def missing(spec: str, package: str) -> FastsalError:
    """Return the error to raise if the library of a data set is not installed."""
    return FastsalError(f"data: {spec!r} requires {package}: pip install {package}")
