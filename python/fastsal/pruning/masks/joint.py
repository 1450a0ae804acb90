"""Masks of a pattern by the joint cost of each group."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import fastsal._core as _core
from fastsal.errors import InvalidArgument
from fastsal.fisher.block_fisher import BlockFisher, sums_of
from fastsal.fisher.checks import check_damping
from fastsal.fisher.inverses import raise_failed
from fastsal.fisher.parts import Part, Parts, flat, slices
from fastsal.fisher.statistics import Statistics, statistics_of
from fastsal.models.selection import model_parameters
from fastsal.pruning.masks.masks import Masks
from fastsal.pruning.masks.patterns import (
    Pattern,
    expand_groups,
    grouped_shape,
    input_axes,
    reduce_groups,
)

LARGEST_GROUP = 8


def rank_pattern(
    model: nn.Module,
    fisher: BlockFisher | Statistics,
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
    from fastsal.pruning.masks.patterns import check_fixed
    from fastsal.pruning.masks.ranking import rank

    damping = check_damping(damping)
    wanted = Pattern.parse(pattern)
    if wanted.m > LARGEST_GROUP:
        raise InvalidArgument(
            f"pattern: got {pattern!r}; by joint cost takes groups of up to {LARGEST_GROUP}; "
            "rank(scores, pattern=...) takes any"
        )
    statistics = statistics_of(fisher)
    owned = model_parameters(model, statistics.shapes)
    recipe = {"pattern": str(wanted), "joint": True}
    if wanted.is_whole:
        costs = joint_costs(owned, statistics, wanted, damping)
        groups = rank(costs, sparsity, scope=scope, floor=floor)
        kept = {name: expand_groups(groups[name], p.shape, wanted.m) for name, p in owned.items()}
        return Masks(kept, {**groups.recipe, **recipe})
    check_fixed(wanted, sparsity, floor)
    return Masks(joint_choice(owned, statistics, wanted, damping), recipe)


def joint_costs(
    tensors: Mapping[str, Tensor], statistics: Statistics, pattern: Pattern, damping: float
) -> dict[str, Tensor]:
    """Name to the joint costs of whole groups `[outer, G, inner]`, by the statistics' names."""
    costs = {name: torch.empty(grouped_shape(w.shape, pattern.m)) for name, w in tensors.items()}
    for weights, parts, given in _by_rows(tensors, statistics):
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
    tensors: Mapping[str, Tensor], statistics: Statistics, pattern: Pattern, damping: float
) -> dict[str, Tensor]:
    """Name to the mask of N:M by joint costs, by the statistics' names."""
    kept = {name: torch.empty(w.shape, dtype=torch.bool) for name, w in tensors.items()}
    for _, parts, given in _by_rows(tensors, statistics):
        chosen = _core.n_of_m_joint(*given, pattern.n, pattern.m, damping)
        for (key, part), (mask, failed) in zip(parts.items(), chosen, strict=True):
            raise_failed(key, failed, damping)
            part.of(kept[part.name]).copy_(torch.from_numpy(mask).reshape(-1))
        del given, chosen  # before sums of the next parts are made
    return kept


def _by_rows(
    tensors: Mapping[str, Tensor], statistics: Statistics
) -> Iterator[tuple[dict[str, Tensor], Parts, tuple[Any, Any, Any, int]]]:
    """Parts that end with rows of axis 0, as groups do: weights, parts, what the core takes."""
    for fisher, parts in statistics.groups(cuts=False):
        weights = {
            key: in_rows(values, tensors[parts[key].name].shape)
            for key, values in slices(tensors, parts).items()
        }
        yield weights, parts, _inputs(fisher, weights)


def in_rows(values: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """A part that ends with rows of axis 0, in its parameter's shape but for their number."""
    return values.reshape(-1, *shape[1:])


def _rows_of(groups: Tensor, part: Part) -> Tensor:
    """The groups `[rows, G, inner]` of a part, of those of its parameter."""
    each = part.size // groups.shape[0]
    return groups[part.start // each : -(-part.stop // each)]


def _inputs(fisher: BlockFisher, weights: Mapping[str, Tensor]) -> tuple[Any, Any, Any, int]:
    """Statistics, weights, axes and block size, as the core takes them."""
    parameters, block_size = sums_of(fisher).all_for_core()
    rows = [flat(w).float().numpy() for w in weights.values()]
    return parameters, rows, [input_axes(w.shape) for w in weights.values()], block_size
