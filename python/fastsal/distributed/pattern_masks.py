"""Masks of a pattern by several ranks: groups are within parts, which are cut between rows."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fastsal.distributed.ranks import Ranks
from fastsal.distributed.sharding import Mine
from fastsal.distributed.thresholds import assembled, masks_of_shards
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


def pattern_masks_of_shards(
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
    """Choose the masks of a pattern, those of `fastsal.rank` or `rank_pattern` for the whole model.

    Args:
        mine: The model and this rank's parts, which end with rows of axis 0.
        statistics: Statistics of those parts.
        scores: Key to scores of this rank's parts.
        goal: Fraction of the groups to prune, for `"1xM"`.
        damping: Absolute `λ`.
        ranks: The processes.
        pattern: `"N:M"` or `"1xM"`.
        scope: Groups that compete with each other, see `fastsal.rank`.
        floor: Least fraction of the groups of any parameter to keep.
        joint: Whether groups are compared by joint costs, or by the sum of scores.

    Returns:
        The masks of the whole model, the same on every rank.

    Raises:
        InvalidArgument: An argument is invalid, see `fastsal.rank`.
        FactorizationError: A damped block is not positive definite.
    """
    check_ranking(mine.shapes, goal, scope, pattern, floor)
    wanted = Pattern.parse(pattern)
    recipe: dict[str, object] = {"pattern": str(wanted)}
    recipe |= {"joint": True, "damping": damping} if joint else {}
    if not wanted.is_whole:
        kept: Mapping[str, Tensor]
        if joint:
            with ranks.together("joint costs"):
                kept = joint_choice(_in_rows(mine, mine.weights), statistics, wanted, damping)
        else:
            kept = rank(_in_rows(mine, scores), pattern=pattern)
        flat = {key: mask.reshape(-1).numpy() for key, mask in kept.items()}
        return Masks(assembled(flat, mine.shares, mine.shapes, ranks), dict(recipe))
    if joint:
        with ranks.together("joint costs"):
            costs = joint_costs(_in_rows(mine, mine.weights), statistics, wanted, damping)
    else:
        costs = group_scores(_in_rows(mine, scores), wanted.m)
    shares = [[_of_groups(p, mine.shapes, wanted.m) for p in share] for share in mine.shares]
    keys = {p.key: g.key for p, g in zip(mine.parts.values(), shares[ranks.rank], strict=True)}
    groups = masks_of_shards(
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
    return Masks(whole, {**groups.recipe, **recipe}, copy=False)


def _in_rows(mine: Mine, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return parts in the shape of their parameters, except for the number of rows."""
    shapes = mine.shapes
    return {key: in_rows(tensors[key], shapes[part.name]) for key, part in mine.parts.items()}


def _of_groups(part: Part, shapes: Mapping[str, tuple[int, ...]], m: int) -> Part:
    """Return the part of the groups that a part of the weights is made of."""
    _, width, inner = input_axes(shapes[part.name])
    outer, groups, _ = grouped_shape(shapes[part.name], m)
    first, last = part.start // (width * inner), -(-part.stop // (width * inner))
    each = groups * inner
    return Part(part.name, first * each, last * each, outer * each)
