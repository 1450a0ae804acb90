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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastsal import _core
from fastsal.errors import InvalidArgument
from fastsal.fisher.block_fisher import BlockFisher, check_damping
from fastsal.fisher.parts import Part, Parts, flat, slices
from fastsal.pruning.criteria.block_fisher import raise_failed
from fastsal.pruning.criteria.scoring import model_parameters
from fastsal.pruning.masks.masks import Masks

LARGEST_GROUP = 8


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


def rank_pattern(
    model: nn.Module,
    fisher: BlockFisher,
    pattern: str,
    sparsity: float | None = None,
    damping: float = 1e-5,
    *,
    scope: str = "global",
    floor: float = 0.0,
) -> Masks:
    """Choose masks of a pattern by joint costs.

    Args:
        model: The model that the statistics were collected on.
        fisher: Statistics from `collect`.
        pattern: `"N:M"`, M up to 8: in each group those N stay whose complement costs least; then
            a pruned weight comes back for a kept one of its group and block, the best exchange
            first, until none lowers what joint compensation of the block leaves. `"1xM"`: whole
            groups go, those that cost least.
        sparsity: Fraction of the groups that goes, for `"1xM"`; N:M fixes it.
        damping: `λ`, above zero.
        scope: Where groups compete, as for `rank`; for `"1xM"`.
        floor: Least kept fraction of any parameter's groups; N:M keeps N of M anyway.

    Raises:
        InvalidArgument: Bad pattern, sparsity, floor or damping.
        FactorizationError: A damped block is not positive definite.
    """
    from fastsal.pruning.masks.ranking import check_fixed, rank

    check_damping(damping)
    wanted = Pattern.parse(pattern)
    if wanted.m > LARGEST_GROUP:
        raise InvalidArgument(
            f"pattern: got {pattern!r}; by joint cost takes groups of up to {LARGEST_GROUP}; "
            "rank(scores, pattern=...) takes any"
        )
    owned = model_parameters(model, fisher.shapes)
    recipe = {"pattern": str(wanted), "joint": True}
    if wanted.is_whole:
        costs = joint_costs(owned, fisher, wanted, damping)
        groups = rank(costs, sparsity, scope=scope, floor=floor)
        kept = {name: expand_groups(groups[name], p.shape, wanted.m) for name, p in owned.items()}
        return Masks(kept, {**groups.recipe, **recipe})
    check_fixed(wanted, sparsity, floor)
    return Masks(joint_choice(owned, fisher, wanted, damping), recipe)


def joint_costs(
    tensors: Mapping[str, Tensor], fisher: BlockFisher, pattern: Pattern, damping: float
) -> dict[str, Tensor]:
    """Name to the joint costs of whole groups `[outer, G, inner]`, by the statistics' names."""
    costs = {name: torch.empty(grouped_shape(w.shape, pattern.m)) for name, w in tensors.items()}
    for weights, parts, given in _by_rows(tensors, fisher):
        found = _core.group_costs(*given, pattern.m, damping)
        for (key, part), (values, failed) in zip(parts.items(), found, strict=True):
            raise_failed(key, failed, damping)
            every = torch.from_numpy(values).reshape(weights[key].shape)
            # Every member has the cost of its group.
            some = reduce_groups(every, pattern.m, "first")
            _rows_of(costs[part.name], part).copy_(some)
        del weights, given, found  # before sums of the next parts are made
    return costs


def joint_choice(
    tensors: Mapping[str, Tensor], fisher: BlockFisher, pattern: Pattern, damping: float
) -> dict[str, Tensor]:
    """Name to the mask of N:M by joint costs, by the statistics' names."""
    kept = {name: torch.empty(w.shape, dtype=torch.bool) for name, w in tensors.items()}
    for _, parts, given in _by_rows(tensors, fisher):
        chosen = _core.n_of_m_joint(*given, pattern.n, pattern.m, damping)
        for (key, part), (mask, failed) in zip(parts.items(), chosen, strict=True):
            raise_failed(key, failed, damping)
            part.of(kept[part.name]).copy_(torch.from_numpy(mask).reshape(-1))
        del given, chosen  # before sums of the next parts are made
    return kept


def _by_rows(
    tensors: Mapping[str, Tensor], fisher: BlockFisher
) -> Iterator[tuple[dict[str, Tensor], Parts, tuple[Any, Any, Any, int]]]:
    """Parts that end with rows of axis 0, as groups do: weights, parts, what the core takes."""
    for statistics, parts in fisher._views(cuts=False):
        weights = {
            key: in_rows(values, tensors[parts[key].name].shape)
            for key, values in slices(tensors, parts).items()
        }
        yield weights, parts, _inputs(statistics, weights)


def in_rows(values: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """A part that ends with rows of axis 0, in its parameter's shape but for their number."""
    return values.reshape(-1, *shape[1:])


def _rows_of(groups: Tensor, part: Part) -> Tensor:
    """The groups `[rows, G, inner]` of a part, of those of its parameter."""
    each = part.size // groups.shape[0]
    return groups[part.start // each : -(-part.stop // each)]


def _inputs(fisher: BlockFisher, weights: Mapping[str, Tensor]) -> tuple[Any, Any, Any, int]:
    """Statistics, weights, axes and block size, as the core takes them."""
    parameters, block_size = fisher._borrow_all(None)
    rows = [flat(w).float().numpy() for w in weights.values()]
    return parameters, rows, [input_axes(w.shape) for w in weights.values()], block_size


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
