"""Names of data sets: what `open_images` accepts, and the message for an unknown one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fastsal.errors import FastsalError, InvalidArgument


@dataclass(frozen=True)
class DataName:
    """What `library:name?key=value&key=value` says.

    Attributes:
        spec: as it was given, for messages.
        library: "sklearn", "torchvision" or "hf".
        name: of the data set there.
        query: the keys and values.
        root: the folder that relative paths start from.
    """

    spec: str
    library: str
    name: str
    query: dict[str, str]
    root: Path

    @property
    def may_download(self) -> bool:
        """Whether `download=true` was asked for."""
        value = self.query.get("download", "false")
        if value not in ("true", "false"):
            raise InvalidArgument(f"data: {self.spec!r}: download={value}; takes true or false")
        return value == "true"

    def path(self, text: str) -> Path:
        """Return a path, below `root` if it is relative."""
        return self.root / Path(text).expanduser()


def missing(spec: str, package: str) -> FastsalError:
    """Return the error of a library that is not installed."""
    return FastsalError(f"data: {spec!r} needs {package}: pip install {package}")
