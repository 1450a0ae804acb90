"""Where image files are: in a folder, or inside a tar archive.

A place has `open("rb")`, as `pathlib.Path` has it, and a text that names it in messages.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from fastsal.errors import DataError
from fastsal.utils.digests import Digest, file_digest


@dataclass(frozen=True)
class TarImage:
    """An image file inside a tar archive without compression.

    Attributes:
        archive: Path of the archive.
        name: Name of the image in the archive; of an archive in an archive, both names.
        offset: Position of its first byte in the file `archive`.
        size: Its number of bytes.
    """

    archive: Path
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.archive}/{self.name}"

    def open(self, mode: Literal["rb"] = "rb") -> BinaryIO:
        """Return the content of the image as an open file.

        Raises:
            DataError: The archive is shorter than it was when it was opened.
        """
        with self.archive.open(mode) as file:
            file.seek(self.offset)
            content = file.read(self.size)
        if len(content) < self.size:
            raise DataError(f"data: {self.archive} is truncated at {self.name}")
        return io.BytesIO(content)


Place = Path | TarImage


def place_digest(place: Place) -> str:
    """Return the SHA-256 of the content of an image file, in hexadecimal."""
    if isinstance(place, Path):
        return file_digest(place)
    with place.open("rb") as file:
        return Digest().update(file.read()).hexdigest()
