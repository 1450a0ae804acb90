"""Patterns that hardware likes: N of every M along the input axis, or whole groups of M.

From second-order statistics a group is judged by its joint cost: removing the set `P` and moving
the other weights costs `θ_Pᵀ ([A⁻¹]_PP)⁻¹ θ_P / 2` (Kurtic et al. 2022, oBERT, eq. 5), which the
costs of single weights do not add up to where gradients are correlated. The costs of groups do not
add up either: of N:M, pruned and kept weights of a group are then exchanged while that lowers the
joint cost of their whole block.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fastsal.errors import InvalidArgument


@dataclass(frozen=True)
class Pattern:
    """`"N:M"` keeps N of every M; `"1xM"` keeps or prunes M neighbours together.

    Groups lie along axis 1, the input axis; the last of a row may be short. A short group of r
    keeps `ceil(r N / M)` of N:M.
    """

    n: int
    m: int
    is_whole: bool

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Read a pattern.

        Raises:
            InvalidArgument: It is none.
        """
        clean = str(text).strip()
        match = re.fullmatch(r"(\d+):(\d+)", clean)
        if match and 0 < int(match[1]) <= int(match[2]):
            return cls(int(match[1]), int(match[2]), False)
        match = re.fullmatch(r"1[x×](\d+)", clean)
        if match and int(match[1]) > 0:
            return cls(0, int(match[1]), True)
        raise InvalidArgument(
            f"pattern: got {text!r}; takes 'N:M' with 0 < N <= M, as '2:4', or '1xM', as '1x4'"
        )

    def __str__(self) -> str:
        return f"1x{self.m}" if self.is_whole else f"{self.n}:{self.m}"


def input_axes(shape: torch.Size | tuple[int, ...]) -> tuple[int, int, int]:
    """Return `[outer, width, inner]` around the input axis; a vector is one row."""
    if len(shape) < 2:
        return 1, math.prod(shape), 1
    return shape[0], shape[1], math.prod(shape[2:])


def grouped_shape(shape: torch.Size | tuple[int, ...], m: int) -> tuple[int, int, int]:
    """Return `[outer, G, inner]`, the shape of a parameter's groups."""
    outer, width, inner = input_axes(shape)
    return outer, -(-width // m), inner


def reduce_groups(values: Tensor, m: int, how: str) -> Tensor:
    """Return a value for each group, the `"sum"` or the `"first"` member; `[outer, G, inner]`."""
    outer, width, inner = input_axes(values.shape)
    flat = values.reshape(outer, width, inner)
    if how == "first":
        return flat[:, ::m].contiguous()
    missing = -width % m
    padded = torch.nn.functional.pad(flat, (0, 0, 0, missing))
    return padded.reshape(outer, -1, m, inner).sum(2)


def expand_groups(groups: Tensor, shape: torch.Size | tuple[int, ...], m: int) -> Tensor:
    """Give every member what its group has."""
    _, width, _ = input_axes(shape)
    return groups.repeat_interleave(m, 1)[:, :width].reshape(shape).contiguous()


def group_scores(scores: Mapping[str, Tensor], m: int) -> dict[str, Tensor]:
    """Return the summed scores of each group, from scores of single weights."""
    return {name: reduce_groups(values.float(), m, "sum") for name, values in scores.items()}


def check_fixed(pattern: Pattern, sparsity: float | None, floor: float) -> None:
    """Raise InvalidArgument for a sparsity or a floor that N:M does not have."""
    fixed = 1 - pattern.n / pattern.m
    if sparsity is not None and abs(sparsity - fixed) > 1e-9:
        raise InvalidArgument(
            f"sparsity: got {sparsity} with pattern {pattern}, which fixes it to {fixed:g}; "
            "leave one of them out"
        )
    _check_fraction("floor", floor)
    if floor > pattern.n / pattern.m:
        kept = f"{pattern.n / pattern.m:g}"
        raise InvalidArgument(f"floor: got {floor}; {pattern} keeps {kept} of a parameter")


def _check_fraction(name: str, value: float) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (is_number and 0 <= value <= 1):
        raise InvalidArgument(f"{name}: got {value!r}; takes a fraction from 0 to 1")
