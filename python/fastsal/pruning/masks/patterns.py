"""Sparsity patterns that hardware supports: N of every M along the input axis, or groups of M.

With second-order statistics, groups are compared by joint cost: removing the set `P` and updating
the other weights costs `θ_Pᵀ ([A⁻¹]_PP)⁻¹ θ_P / 2` (Kurtic et al. 2022, oBERT, eq. 5). Where
gradients are correlated this differs from the sum of the costs of single weights. Nor do the costs
of groups add up: with N:M, pruned and kept weights of a group are exchanged while that lowers the
joint cost of their whole block.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastsal.errors import InvalidArgument
from fastsal.models.input_axis import Axes, input_axes
from fastsal.utils.numbers import real


@dataclass(frozen=True)
class Pattern:
    """A pattern: `"N:M"` keeps N of every M weights, `"1xM"` keeps or prunes M weights together.

    Groups are consecutive along the input axis, which the layer says; see `models/input_axis.py`.
    The last group of a row may be shorter;
    with N:M a group of r weights keeps `ceil(r N / M)`.

    Attributes:
        n: Kept weights of a group; 0 for `"1xM"`.
        m: Weights of a group.
        is_whole: Whether groups are kept or pruned as a whole.
    """

    n: int
    m: int
    is_whole: bool

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Parse a pattern.

        Raises:
            InvalidArgument: `text` is not a pattern.
        """
        clean = str(text).strip()
        # Numbers of more digits are longer than any row, and than the integers of the core.
        match = re.fullmatch(r"(\d{1,18}):(\d{1,18})", clean)
        if match and 0 < int(match[1]) <= int(match[2]):
            return cls(int(match[1]), int(match[2]), False)
        match = re.fullmatch(r"1[x×](\d{1,18})", clean)
        if match and int(match[1]) > 0:
            return cls(0, int(match[1]), True)
        raise InvalidArgument(
            "pattern must be 'N:M' with 0 < N <= M < 1e18 (such as '2:4') or '1xM' (such as "
            f"'1x4'), got {text!r:.80}"
        )

    def __str__(self) -> str:
        return f"1x{self.m}" if self.is_whole else f"{self.n}:{self.m}"


def grouped_shape(axes: Axes, m: int) -> tuple[int, int, int]:
    """Return `[outer, G, inner]`, the shape of a parameter's groups."""
    return axes.outer, -(-axes.width // m), axes.inner


def reduce_groups(values: Tensor, m: int, how: str, axes: Axes | None = None) -> Tensor:
    """Return the `"sum"` or the `"first"` member of each group, `[outer, G, inner]`.

    The input axis is axis 1, unless `axes` are given.
    """
    outer, width, inner = axes or input_axes(values.shape)
    m = min(m, width)  # a longer group is the row
    flat = values.reshape(outer, width, inner)
    if how == "first":
        return flat[:, ::m].contiguous()
    missing = -width % m
    padded = torch.nn.functional.pad(flat, (0, 0, 0, missing))
    return padded.reshape(outer, -1, m, inner).sum(2)


def expand_groups(groups: Tensor, shape: Sequence[int], m: int, axes: Axes | None = None) -> Tensor:
    """Return a tensor of `shape` in which every member has the value of its group."""
    _, width, _ = axes or input_axes(shape)
    m = min(m, width)  # a longer group is the row
    return groups.repeat_interleave(m, 1)[:, :width].reshape(tuple(shape)).contiguous()


def group_scores(
    scores: Mapping[str, Tensor], m: int, axes: Mapping[str, Axes] | None = None
) -> dict[str, Tensor]:
    """Return the sum of the scores of each group, name to `[outer, G, inner]`."""
    known = axes or {}
    return {
        name: reduce_groups(values.float(), m, "sum", known.get(name))
        for name, values in scores.items()
    }


def recorded_axes(
    shapes: Mapping[str, Sequence[int]], axes: Mapping[str, Axes]
) -> dict[str, dict[str, list[int]]]:
    """Return the entry of a recipe with the axes of parameters whose input axis is not axis 1."""
    others = {name: list(a) for name, a in axes.items() if a != input_axes(shapes[name])}
    return {"input_axes": others} if others else {}


def broken_groups(masks: Mapping[str, Tensor], recipe: Mapping[str, Any]) -> dict[str, int]:
    """Return the number of groups of each parameter that break the pattern of a recipe."""
    text = recipe.get("pattern")
    if text is None:
        return {}
    pattern = Pattern.parse(text)
    recorded = recipe.get("input_axes", {})
    found = {}
    for name, mask in masks.items():
        axes = Axes(*recorded[name]) if name in recorded else input_axes(mask.shape)
        kept = reduce_groups(mask.float(), pattern.m, "sum", axes)
        sizes = reduce_groups(
            torch.ones(mask.shape, dtype=torch.float32, device="cpu"), pattern.m, "sum", axes
        )
        if pattern.is_whole:
            wrong = (kept != 0) & (kept != sizes)
        else:
            wrong = kept > (sizes * pattern.n / pattern.m).ceil()
        if count := int(wrong.sum()):
            found[name] = count
    return found


def check_given(pattern: Pattern, sparsity: object) -> None:
    """Raise InvalidArgument for a pattern that does not fix the sparsity if none is given."""
    if pattern.is_whole and sparsity is None:
        raise InvalidArgument(
            f"sparsity must be in [0, 1] with pattern {str(pattern)!r}, which unlike N:M does not "
            "fix it, got None"
        )


def check_fixed(pattern: Pattern, sparsity: object, floor: float) -> None:
    """Raise InvalidArgument for a sparsity or a floor that contradicts an N:M pattern."""
    fixed = 1 - pattern.n / pattern.m
    is_divided = isinstance(sparsity, Mapping)
    if is_divided or (sparsity is not None and abs(real("sparsity", sparsity) - fixed) > 1e-9):
        raise InvalidArgument(
            f"sparsity must be None or {fixed:g} with pattern {str(pattern)!r}, got {sparsity}"
        )
    floor, most = real("floor", floor, least=0, most=1), pattern.n / pattern.m
    if floor > most:
        raise InvalidArgument(
            f"floor must be at most {most:g} with pattern {str(pattern)!r}, got {floor}"
        )
