"""Checks of the arguments of `BlockFisher`."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastsal.errors import InvalidArgument, UnknownParameter
from fastsal.fisher.rows import Array, as_rows, is_supported
from fastsal.utils.numbers import real, whole
from fastsal.utils.suggestions import listed

# The least λ: smaller numbers are subnormal, and the inverses of the smallest are infinite.
LEAST_DAMPING = sys.float_info.min


def quoted(names: Iterable[str]) -> str:
    """Return quoted names for a message; those beyond the first few are counted."""
    return listed([repr(name) for name in names])


def check_block_size(block_size: Any) -> int | None:
    """Return a block size as an `int`, or None.

    Raises:
        InvalidArgument: It is neither an integer of at least 1 nor None.
    """
    return None if block_size is None else whole("block_size", block_size, 1)


def check_precision(precision: str) -> str:
    """Return the type of sums.

    Raises:
        InvalidArgument: It is neither `"float32"` nor `"float64"`.
    """
    if precision not in ("float32", "float64"):
        raise InvalidArgument(f"precision must be 'float32' or 'float64', got {precision!r}")
    return precision


def check_shapes(shapes: Mapping[str, Sequence[int]]) -> None:
    """Raise InvalidArgument unless there are parameters, and each has weights."""
    if not shapes:
        raise InvalidArgument("shapes must hold at least one parameter")
    for name, shape in shapes.items():
        if math.prod(shape) < 1 or any(n < 0 for n in shape):
            raise InvalidArgument(
                f"shapes must be of at least one weight each, got {tuple(shape)} for {name!r}"
            )


def check_damping(damping: Any) -> float:
    """Return `λ` as a `float`.

    Raises:
        InvalidArgument: It is not a finite number above zero, or its inverse overflows.
    """
    number = real("damping", damping, above=0)
    return real("damping", number, least=LEAST_DAMPING)


def checked_rows(
    gradients: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, tuple[Array, str]], int]:
    """Check the gradients of some samples for all parameters.

    Args:
        gradients: Name to `[n, *shape]`.
        shapes: Name to shape, of all parameters.

    Returns:
        Name to rows and the name of their type, as `as_rows` returns them, and `n`.

    Raises:
        UnknownParameter: A name is missing or unknown.
        InvalidArgument: A shape or a type is wrong, or the numbers of samples differ.
    """
    missing = [name for name in shapes if name not in gradients]
    unknown = sorted(set(gradients) - set(shapes))
    if missing or unknown:
        wrong = f"missing {quoted(missing)}" if missing else f"unknown {quoted(unknown)}"
        raise UnknownParameter(f"gradients must be given for exactly {quoted(shapes)}; {wrong}")
    prepared = {}
    counts = set()
    for name, value in gradients.items():
        tensor = value if isinstance(value, Tensor) else torch.as_tensor(value, device="cpu")
        shape = shapes[name]
        if tensor.dim() != len(shape) + 1 or tuple(tensor.shape[1:]) != shape:
            raise InvalidArgument(
                f"gradients of {name!r} must have shape [{', '.join(map(str, ('n', *shape)))}], "
                f"got {list(tensor.shape)}"
            )
        if not is_supported(tensor.dtype):
            raise InvalidArgument(
                f"gradients of {name!r} must be float32, float16, bfloat16 or float64, "
                f"got {tensor.dtype}"
            )
        counts.add(tensor.shape[0])
        prepared[name] = as_rows(tensor)
    if len(counts) != 1 or 0 in counts:
        raise InvalidArgument(
            "gradients must have the same number of samples, at least 1, for every parameter, "
            f"got {sorted(counts)}"
        )
    return prepared, counts.pop()
