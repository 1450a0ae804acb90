"""Choose masks of a pattern by the joint cost of each group."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import fastsal._core as _core
from fastsal.errors import InvalidArgument
from fastsal.fisher.block_fisher import BlockFisher, sums_of
from fastsal.fisher.inverses import raise_failed
from fastsal.fisher.parts import Part, Parts, flat, slices
from fastsal.fisher.statistics import Statistics, statistics_of
from fastsal.models.input_axis import Axes, layer_axes
from fastsal.models.selection import check_finite_weights, model_parameters
from fastsal.pruning.damping import resolve_damping
from fastsal.pruning.masks.masks import Masks
from fastsal.pruning.masks.patterns import (
    Pattern,
    expand_groups,
    grouped_shape,
    recorded_axes,
    reduce_groups,
)
from fastsal.pruning.masks.ranking import check_ranking, rank
from fastsal.pruning.masks.shares import Sparsity
from fastsal.pruning.shelf import Shelf
from fastsal.utils.choices import Scope

# Most weights of a group whose joint cost is computed.
LARGEST_GROUP = 8


def rank_pattern(
    model: nn.Module,
    fisher: BlockFisher | Statistics,
    pattern: str,
    sparsity: Sparsity | None = None,
    damping: float | str = "0.1x",
    *,
    scope: Scope = "global",
    floor: float = 0.0,
) -> Masks:
    """Choose the masks of a pattern by the joint cost of pruning each group.

    Removing a set `P` of weights and updating the others costs `θ_Pᵀ ([A⁻¹]_PP)⁻¹ θ_P / 2`, with
    `A = F + λI` (Kurtic et al. 2022, oBERT, eq. 5).

    Args:
        model: The model that the statistics were collected on, with the same weights.
        fisher: Statistics from `fastsal.collect`.
        pattern: `"N:M"` (such as `"2:4"`), M up to 8: of every M weights along the input axis, the
            N are kept whose complement costs least; then pruned and kept weights of a group are
            exchanged, the best exchange first, until none lowers the cost of their block after
            joint compensation. `"1xM"` (such as `"1x4"`), M up to 8: groups of M weights are pruned
            as a whole, those with the lowest costs.
        sparsity: Fraction of the groups to prune, in `[0, 1]`, for `"1xM"`, or a dict of fractions
            as for `fastsal.rank`. None for N:M, which fixes it.
        damping: `λ`: a positive number, or a multiple of the mean diagonal of F such as `"0.1x"`.
        scope: For `"1xM"`, the groups that compete with each other: `"global"`, `"layer"` or
            `"erk"`, see `fastsal.rank`.
        floor: For `"1xM"`, the least fraction of the groups of any parameter to keep.

    Returns:
        The masks, True = kept. `masks.recipe` records how they were made.

    Raises:
        InvalidArgument: An argument is invalid, the statistics hold no samples, or a weight is NaN
            or infinite.
        UnknownParameter: The model lacks a parameter of the statistics, or has it in another shape.
        FactorizationError: A damped block is not positive definite.
    """
    wanted = Pattern.parse(pattern)
    if wanted.m > LARGEST_GROUP:
        raise InvalidArgument(
            f"pattern must have groups of at most {LARGEST_GROUP} for joint costs, got "
            f"{pattern!r}; rank(scores, pattern=...) supports larger ones"
        )
    statistics = statistics_of(fisher)
    owned = model_parameters(model, statistics.shapes)
    shapes = {name: tuple(p.shape) for name, p in owned.items()}
    axes = layer_axes(model, shapes)
    check_ranking(shapes, sparsity, scope, pattern, floor, axes)
    check_finite_weights(owned)
    damping = resolve_damping(damping, statistics)
    recipe = {"pattern": str(wanted), "joint": True, "damping": damping}
    recipe |= recorded_axes(shapes, axes)
    if wanted.is_whole:
        costs = joint_costs(owned, axes, statistics, wanted, damping)
        groups = rank(costs, sparsity, scope=scope, floor=floor)
        kept = {
            name: expand_groups(groups[name], p.shape, wanted.m, axes[name])
            for name, p in owned.items()
        }
        return Masks(kept, {**groups.recipe, **recipe}, copy=False)
    return Masks(joint_choice(owned, axes, statistics, wanted, damping), recipe, copy=False)


def joint_costs(
    tensors: Mapping[str, Tensor],
    axes: Mapping[str, Axes],
    statistics: Statistics,
    pattern: Pattern,
    damping: float,
) -> dict[str, Tensor]:
    """Return the joint costs of whole groups, name of the statistics to `[outer, G, inner]`."""
    shapes = {name: grouped_shape(axes[name], pattern.m) for name in tensors}
    costs = Shelf().room("costs", shapes)
    for parts, inside, given in _by_rows(tensors, axes, statistics):
        found = _core.group_costs(*given, pattern.m, damping)
        for (key, part), (values, failed) in zip(parts.items(), found, strict=True):
            raise_failed(key, failed, damping)
            # Every member has the cost of its group.
            some = reduce_groups(torch.from_numpy(values), pattern.m, "first", inside[key])
            _rows_of(costs[part.name], part).copy_(some)
        del given, found  # before sums of the next parts are made
    return costs


def joint_choice(
    tensors: Mapping[str, Tensor],
    axes: Mapping[str, Axes],
    statistics: Statistics,
    pattern: Pattern,
    damping: float,
) -> dict[str, Tensor]:
    """Return the masks of an N:M pattern by joint costs, by the names of the statistics."""
    kept = Shelf().room("kept", {name: w.shape for name, w in tensors.items()}, torch.bool)
    for parts, _, given in _by_rows(tensors, axes, statistics):
        chosen = _core.n_of_m_joint(*given, pattern.n, pattern.m, damping)
        for (key, part), (mask, failed) in zip(parts.items(), chosen, strict=True):
            raise_failed(key, failed, damping)
            part.of(kept[part.name]).copy_(torch.from_numpy(mask).reshape(-1))
        del given, chosen  # before sums of the next parts are made
    return kept


def _by_rows(
    tensors: Mapping[str, Tensor], axes: Mapping[str, Axes], statistics: Statistics
) -> Iterator[tuple[Parts, dict[str, Axes], tuple[Any, Any, Any, int]]]:
    """Yield groups of parts that end with whole rows: parts, axes, input of the core."""
    for fisher, parts in statistics.groups(cuts=False):
        inside = {key: axes_of_rows(axes[part.name], len(part)) for key, part in parts.items()}
        weights = slices(tensors, parts)
        parameters, block_size = sums_of(fisher).all_for_core()
        rows = [flat(weights[key]).float().numpy() for key in inside]
        yield parts, inside, (parameters, rows, list(inside.values()), block_size)


def axes_of_rows(axes: Axes, size: int) -> Axes:
    """Return the axes of a part of `size` weights that ends with a row of the outer axis."""
    return axes._replace(outer=size // (axes.width * axes.inner))


def _rows_of(groups: Tensor, part: Part) -> Tensor:
    """Return the groups `[rows, G, inner]` of a part, a view of those of its parameter."""
    each = part.size // groups.shape[0]
    return groups[part.start // each : -(-part.stop // each)]
