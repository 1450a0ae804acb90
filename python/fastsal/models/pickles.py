"""Files of `torch.save`, read without running code from them."""

from __future__ import annotations

import argparse
import pathlib
import pickle
import re
import struct
import threading
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np
import torch

from fastsal.errors import FileFormatError
from fastsal.utils.plain_text import first_line, plain_line
from fastsal.utils.suggestions import listed

# The types that may be read are a setting of the process.
_LOCK = threading.Lock()
_DAMAGED = (
    pickle.UnpicklingError, RuntimeError, OSError, EOFError, LookupError, ValueError, TypeError,
    AttributeError, AssertionError, struct.error,
)  # fmt: skip
_REFUSED = re.compile(r"GLOBAL (\S+) (?:was not an allowed|whose module)")
_REASON = re.compile(r"WeightsUnpickler error:\s*([^\n]*)")


def read_pickle(path: pathlib.Path, argument: str, advice: str) -> Any:
    """Read a file of `torch.save` that contains tensors, containers, numbers and plain arguments.

    Arguments are those that training scripts store beside weights: `argparse.Namespace`, paths, and
    numbers and arrays of NumPy. Nothing in the file is executed.

    Args:
        path: The file.
        argument: Name of the argument that gave the path, for the message.
        advice: End of the message, what to do.

    Raises:
        FileFormatError: The file is missing or damaged, or contains other objects.
    """
    try:
        with _LOCK:
            known = set(torch.serialization.get_safe_globals())
            # Those that the user has allowed are not removed at the end of the block.
            added: list[Any] = [each for each in _harmless() if each not in known]
            with torch.serialization.safe_globals(added):
                return torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except _DAMAGED as error:
        raise FileFormatError(
            f"{argument}: {path} cannot be read as plain tensors ({_reason(path, error)}); {advice}"
        ) from None


@cache
def _harmless() -> tuple[Any, ...]:
    """Return the types that may be read beside tensors, with the names that files have for them.

    An array or a number of type `object` is refused.
    """
    try:
        multiarray = import_module("numpy._core.multiarray")
    except ImportError:  # NumPy 1
        multiarray = import_module("numpy.core.multiarray")
    found: list[Any] = [
        argparse.Namespace,
        (np.ndarray, "numpy.ndarray"),
        (np.dtype, "numpy.dtype"),
    ]
    for room in ("numpy.core", "numpy._core"):
        for name in ("scalar", "_reconstruct"):
            found.append((getattr(multiarray, name), f"{room}.multiarray.{name}"))
    for room in ("pathlib", "pathlib._local"):  # the second one in Python 3.13
        found.append((pathlib.PurePosixPath, f"{room}.PosixPath"))
        found.append((pathlib.PureWindowsPath, f"{room}.WindowsPath"))
    kinds = {type(np.dtype(code)) for code in (*np.typecodes["All"], "S", "U") if code != "O"}
    found += [(kind, f"numpy.dtypes.{kind.__name__}") for kind in kinds]
    return tuple(found)


def _reason(path: pathlib.Path, error: Exception) -> str:
    """Return why a file cannot be read; PyTorch's own message is long and recommends the unsafe."""
    if not isinstance(error, pickle.UnpicklingError):
        return first_line(error)
    text = str(error)
    names = _REFUSED.findall(text)
    if names:
        return f"it contains {listed([plain_line(name) for name in _refused(path) or names])}"
    reason = _REASON.search(text)
    return plain_line(reason.group(1)) if reason and reason.group(1) else first_line(error)


def _refused(path: pathlib.Path) -> list[str]:
    """Return the names of all objects in a file that are not read; empty if they are unknown."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # of a file that may be damaged in any way
        return []
    allowed = {each[1] for each in _harmless() if isinstance(each, tuple)} | {"argparse.Namespace"}
    return sorted(name for name in names if name not in allowed)
