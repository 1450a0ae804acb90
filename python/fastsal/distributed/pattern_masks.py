"""Masks of a pattern by several ranks: groups are within parts, which are cut between rows."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fastsal.distributed.ranks import Ranks
from fastsal.distributed.sharding import Mine
from fastsal.distributed.thresholds import assembled, masks_of_shards
from fastsal.fisher.parts import Part
from fastsal.fisher.statistics import Statistics
from fastsal.models.input_axis import Axes, WithAxes
from fastsal.pruning.masks.joint import axes_of_rows, joint_choice, joint_costs
from fastsal.pruning.masks.masks import Masks
from fastsal.pruning.masks.patterns import (
    Pattern,
    expand_groups,
    group_scores,
    grouped_shape,
    recorded_axes,
)
from fastsal.pruning.masks.ranking import check_ranking, rank
from fastsal.pruning.masks.shares import Sparsity


def pattern_masks_of_shards(
    mine: Mine,
    statistics: Statistics,
    scores: Mapping[str, Tensor],
    goal: Sparsity | None,
    damping: float,
    ranks: Ranks,
    *,
    axes: Mapping[str, Axes],
    pattern: str,
    scope: str,
    floor: float,
    joint: bool,
) -> Masks:
    """Choose the masks of a pattern, those of `fastsal.rank` or `rank_pattern` for the whole model.

    Args:
        mine: The model and this rank's parts, which end with rows of the outer axis.
        statistics: Statistics of those parts.
        scores: Key to scores of this rank's parts.
        goal: Fraction of the groups to prune, for `"1xM"`.
        damping: Absolute `λ`.
        ranks: The processes.
        axes: Name to input axes, of the whole model.
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
    check_ranking(mine.shapes, goal, scope, pattern, floor, axes)
    wanted = Pattern.parse(pattern)
    recipe: dict[str, object] = {"pattern": str(wanted)}
    recipe |= {"joint": True, "damping": damping} if joint else {}
    recipe |= recorded_axes(mine.shapes, axes)
    inside = {key: axes_of_rows(axes[part.name], len(part)) for key, part in mine.parts.items()}
    if not wanted.is_whole:
        kept: Mapping[str, Tensor]
        if joint:
            with ranks.together("joint costs"):
                kept = joint_choice(mine.weights, inside, statistics, wanted, damping)
        else:
            kept = rank(WithAxes(scores, inside), pattern=pattern)
        flat = {key: mask.reshape(-1).numpy() for key, mask in kept.items()}
        return Masks(assembled(flat, mine.shares, mine.shapes, ranks), dict(recipe))
    if joint:
        with ranks.together("joint costs"):
            costs = joint_costs(mine.weights, inside, statistics, wanted, damping)
    else:
        costs = group_scores(scores, wanted.m, inside)
    shares = [[_of_groups(p, axes[p.name], wanted.m) for p in share] for share in mine.shares]
    keys = {p.key: g.key for p, g in zip(mine.parts.values(), shares[ranks.rank], strict=True)}
    groups = masks_of_shards(
        {keys[key]: values for key, values in costs.items()},
        shares,
        {name: grouped_shape(axes[name], wanted.m) for name in mine.shapes},
        ranks,
        goal,
        scope=scope,
        floor=floor,
    )
    whole = {
        name: expand_groups(groups[name], shape, wanted.m, axes[name])
        for name, shape in mine.shapes.items()
    }
    return Masks(whole, {**groups.recipe, **recipe}, copy=False)


def _of_groups(part: Part, axes: Axes, m: int) -> Part:
    """Return the part of the groups that a part of the weights is made of."""
    _, width, inner = axes
    outer, groups, _ = grouped_shape(axes, m)
    first, last = part.start // (width * inner), -(-part.stop // (width * inner))
    each = groups * inner
    return Part(part.name, first * each, last * each, outer * each)
