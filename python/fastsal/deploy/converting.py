"""The error of a converter of another library, as one of ours."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from fastsal.errors import FastsalError
from fastsal.utils.plain_text import first_line


@contextlib.contextmanager
def converting(model: nn.Module, converter: str) -> Iterator[None]:
    """Raise FastsalError for whatever the converter, or the model in it, raises."""
    try:
        yield
    except Exception as error:
        raise FastsalError(
            f"model: {converter} cannot convert {type(model).__name__} "
            f"({type(error).__name__}: {first_line(error)})"
        ) from error
