"""Masks of a pattern by several ranks: groups lie within parts, which are cut between rows."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fastsal.distributed.ranks import Ranks
from fastsal.distributed.sharding import Mine
from fastsal.distributed.thresholds import assembled, rank_shards
from fastsal.fisher.parts import Part
from fastsal.fisher.statistics import Statistics
from fastsal.pruning.masks.joint import in_rows, joint_choice, joint_costs
from fastsal.pruning.masks.masks import Masks
from fastsal.pruning.masks.patterns import (
    Pattern,
    expand_groups,
    group_scores,
    grouped_shape,
    input_axes,
)
from fastsal.pruning.masks.ranking import check_ranking, rank


def rank_pattern_shards(
    mine: Mine,
    statistics: Statistics,
    scores: Mapping[str, Tensor],
    goal: float | None,
    damping: float,
    ranks: Ranks,
    *,
    pattern: str,
    scope: str,
    floor: float,
    joint: bool,
) -> Masks:
    """Choose masks of a pattern, the same on every rank, as `rank` or `rank_pattern` do.

    Args:
        mine: The model and this rank's parts, which end with rows of axis 0.
        statistics: Statistics of those parts.
        scores: Key to scores of this rank's parts.
        goal: Fraction of the groups that goes, for `"1xM"`.
        damping: `λ`.
        ranks: The processes.
        pattern: `"N:M"` or `"1xM"`.
        scope: As for `rank`; so is `floor`.
        floor: Least kept fraction of any parameter's groups.
        joint: Whether groups are judged by their joint costs, or by the sum of scores.

    Raises:
        InvalidArgument: As for `rank`.
        FactorizationError: A damped block is not positive definite.
    """
    check_ranking(mine.shapes, goal, scope, pattern, floor)
    wanted = Pattern.parse(pattern)
    recipe = {"pattern": str(wanted)} | ({"joint": True} if joint else {})
    if not wanted.is_whole:
        kept: Mapping[str, Tensor]
        if joint:
            with ranks.failing_together(statistics):
                kept = joint_choice(_in_rows(mine, mine.weights), statistics, wanted, damping)
        else:
            kept = rank(_in_rows(mine, scores), pattern=pattern)
        flat = {key: mask.reshape(-1).numpy() for key, mask in kept.items()}
        return Masks(assembled(flat, mine.shares, mine.shapes, ranks), dict(recipe))
    if joint:
        with ranks.failing_together(statistics):
            costs = joint_costs(_in_rows(mine, mine.weights), statistics, wanted, damping)
    else:
        costs = group_scores(_in_rows(mine, scores), wanted.m)
    shares = [[_of_groups(p, mine.shapes, wanted.m) for p in share] for share in mine.shares]
    keys = {p.key: g.key for p, g in zip(mine.parts.values(), shares[ranks.rank], strict=True)}
    groups = rank_shards(
        {keys[key]: values for key, values in costs.items()},
        shares,
        {name: grouped_shape(shape, wanted.m) for name, shape in mine.shapes.items()},
        ranks,
        goal,
        scope=scope,
        floor=floor,
    )
    whole = {
        name: expand_groups(groups[name], torch.Size(shape), wanted.m)
        for name, shape in mine.shapes.items()
    }
    return Masks(whole, {**groups.recipe, **recipe})


def _in_rows(mine: Mine, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parts in the shape of their parameters, but for the number of rows."""
    shapes = mine.shapes
    return {key: in_rows(tensors[key], shapes[part.name]) for key, part in mine.parts.items()}


def _of_groups(part: Part, shapes: Mapping[str, tuple[int, ...]], m: int) -> Part:
    """A part of the weights as a part of the groups."""
    _, width, inner = input_axes(shapes[part.name])
    outer, groups, _ = grouped_shape(shapes[part.name], m)
    first, last = part.start // (width * inner), -(-part.stop // (width * inner))
    each = groups * inner
    return Part(part.name, first * each, last * each, outer * each)
