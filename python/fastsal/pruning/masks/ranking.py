"""Turn scores into masks: how many weights are pruned, and which.

Counts are exact: `round(sparsity * d)` weights are pruned, of all parameters (`"global"`) or of
each. Among equal scores the first are pruned, in the order of parameters and positions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import fastsal._core as _core
from fastsal.errors import InvalidArgument
from fastsal.models.input_axis import Axes, WithAxes, input_axes, layer_axes, unknown_axis
from fastsal.models.selection import model_parameters
from fastsal.pruning.masks.costs import (
    check_floors,
    checked_costs,
    counts_by_cost,
    priced,
)
from fastsal.pruning.masks.masks import Masks
from fastsal.pruning.masks.patterns import (
    Pattern,
    check_fixed,
    check_given,
    expand_groups,
    group_scores,
    grouped_shape,
    recorded_axes,
)
from fastsal.pruning.masks.shares import Sparsity, checked_sparsity, divided
from fastsal.utils.choices import SCOPES, Scope
from fastsal.utils.numbers import real
from fastsal.utils.suggestions import check_choice


def rank(
    scores: Mapping[str, Tensor],
    sparsity: Sparsity | None = None,
    scope: Scope = "global",
    pattern: str | None = None,
    floor: float = 0.0,
    *,
    model: nn.Module | None = None,
    costs: Mapping[str, float] | None = None,
) -> Masks:
    """Turn scores into masks: the weights with the lowest scores are pruned.

    Exactly `round(sparsity * d)` of d weights are pruned, with the scope `"layer"` of the d weights
    of each parameter. Among equal scores the first are pruned, in the order of parameters and
    positions.

    Args:
        scores: Name to scores of any shape, floating point, without NaN; `fastsal.score` returns
            them.
        sparsity: Fraction of the weights to prune, in `[0, 1]`. None with an N:M pattern, which
            fixes it. Or a dict of such fractions, `{"*.attn.*": 0.5, "*": 0.7}`: the parameters
            of each key, a name or `fnmatch` pattern, are ranked on their own. A parameter belongs
            to the key that is its name, or else to the first that matches; without any it is kept.
        scope: Weights that compete with each other:

            - `"global"`: all; one threshold over the whole model.
            - `"layer"`: those of one parameter; the same fraction of each is pruned.
            - `"erk"`: those of one parameter, with Erdős-Rényi kernel densities (Evci et al. 2020,
              RigL, section 3): the density is proportional to the sum of the dimensions over their
              product.
        pattern: None for single weights. `"N:M"` (such as `"2:4"`) keeps the N best of every M
            weights along the input axis; a last group of r < M keeps `ceil(r N / M)`; `scope` is
            ignored. `"1xM"` (such as `"1x4"`) keeps or prunes M weights together, by the
            sum of their scores; sparsity and floor count groups. `fastsal.rank_pattern` compares
            groups by joint cost instead.
        floor: Least fraction of any parameter to keep, in `[0, 1]`, rounded up to whole weights.
        model: The model of the scores, whose layers say which axis is their input. None uses what
            `fastsal.score` noted in its result, and axis 1 for other dicts.
        costs: Name to the cost of one weight of a parameter, such as its multiply-accumulates from
            `fastsal.weight_macs`. `sparsity` is then the fraction of the cost of all weights to
            prune, up to half the cost of one weight, and those with the lowest scores per cost are
            pruned. Weights that cost nothing are kept. Only for single weights with the scope
            `"global"`.

    Returns:
        The masks, True = kept. `masks.recipe` records how they were made.

    Raises:
        InvalidArgument: A fraction is outside `[0, 1]`, the floor does not allow the sparsity,
            scope or pattern is unknown, scores are empty or NaN, the input axis of a parameter
            is unknown, or costs are invalid.
        UnknownParameter: The model lacks a parameter of the scores, or has it in another shape; a
            pattern of `sparsity` matches nothing.
    """
    noted = scores.axes if isinstance(scores, WithAxes) else None
    scores = {name: torch.as_tensor(values, device="cpu") for name, values in scores.items()}
    flat = _flat(scores)
    shapes = {name: tuple(values.shape) for name, values in scores.items()}
    axes: dict[str, Axes] = {}
    if pattern is not None:
        axes = _axes(noted, shapes, model)
    check_ranking(shapes, sparsity, scope, pattern, floor, axes, costs)
    sparsity, floor = None if sparsity is None else checked_sparsity(sparsity), float(floor)
    recipe: dict[str, object] = {"scope": scope, "floor": floor}
    wanted = None if pattern is None else Pattern.parse(pattern)
    if wanted is not None and wanted.is_whole:
        groups = rank(group_scores(scores, wanted.m, axes), sparsity, scope=scope, floor=floor)
        whole = {
            name: expand_groups(groups[name], values.shape, wanted.m, axes[name])
            for name, values in scores.items()
        }
        recipe = {**groups.recipe, "pattern": str(wanted)}
        return Masks(whole, {**recipe, **recorded_axes(shapes, axes)}, copy=False)
    kept = {}
    if wanted is not None:
        recipe = {"pattern": pattern, **recorded_axes(shapes, axes)}
        for name, values in flat.items():
            kept[name] = _core.n_of_m(values.numpy(), axes[name], wanted.n, wanted.m)
    elif sparsity is not None:
        recipe["sparsity"] = sparsity
        if costs is not None:
            recipe["costs"] = costs = checked_costs(costs, list(shapes), scope, pattern)
        arrays = {name: values.numpy() for name, values in flat.items()}
        if isinstance(sparsity, Mapping):
            thresholds = {}
            for key, names in divided(sparsity, shapes).items():
                some = {name: arrays[name] for name in names}
                masks, thresholds[key] = _smallest(some, shapes, sparsity[key], scope, floor, costs)
                kept.update(masks)
            recipe["thresholds"] = thresholds
            kept = {n: kept.get(n, np.ones(values.size, bool)) for n, values in arrays.items()}
        else:
            kept, threshold = _smallest(arrays, shapes, sparsity, scope, floor, costs)
            if scope == "global":
                recipe["threshold"] = threshold
    masks_ = {name: torch.from_numpy(mask).reshape(shapes[name]) for name, mask in kept.items()}
    return Masks(masks_, recipe, copy=False)


def _smallest(
    scores: Mapping[str, NDArray[np.float32]],
    shapes: Mapping[str, Sequence[int]],
    sparsity: float,
    scope: str,
    floor: float,
    costs: Mapping[str, float] | None,
) -> tuple[dict[str, NDArray[np.bool_]], float | None]:
    """Return flat masks of some parameters, and the threshold; None with the other scopes."""
    shapes = {name: shapes[name] for name in scores}
    if costs is None and scope == "global":
        needed = list(floor_counts(shapes, floor).values()) if floor > 0 else []
        count = global_count(shapes, sparsity)
        masks, threshold = _core.prune_smallest(list(scores.values()), count, needed)
        return dict(zip(scores, masks, strict=True)), threshold
    threshold = None
    if costs is not None:
        counts, threshold = counts_by_cost(
            shapes,
            costs,
            sparsity,
            floor_counts(shapes, floor),
            lambda name, price, upper: _core.count_keys(priced(scores[name], price), upper),
        )
    else:
        counts = layer_counts(shapes, sparsity, scope, floor)
    kept = {n: _core.prune_smallest([s], counts[n], [])[0][0] for n, s in scores.items()}
    return kept, threshold


def check_ranking(
    shapes: Mapping[str, Sequence[int]],
    sparsity: Sparsity | None,
    scope: str = "global",
    pattern: str | None = None,
    floor: float = 0.0,
    axes: Mapping[str, Axes] | None = None,
    costs: Mapping[str, float] | None = None,
) -> None:
    """Raise InvalidArgument if `rank` would, for scores of these shapes, input axes and costs."""
    floor = real("floor", floor, least=0, most=1)
    check_choice("scope", scope, SCOPES)
    each = None if costs is None else checked_costs(costs, list(shapes), scope, pattern)
    wanted = None if pattern is None else Pattern.parse(pattern)
    if wanted is not None and wanted.is_whole:
        check_given(wanted, sparsity)
        groups = {}
        for name, shape in shapes.items():
            around = (axes or {}).get(name) or input_axes(shape)
            groups[name] = grouped_shape(around, wanted.m)
        check_ranking(groups, sparsity, scope, None, floor)
        return
    if wanted is not None:
        check_fixed(wanted, sparsity, floor)
        return
    if sparsity is None:
        raise InvalidArgument("sparsity must be in [0, 1], got None")
    sparsity = checked_sparsity(sparsity)
    if isinstance(sparsity, Mapping):
        for key, names in divided(sparsity, shapes).items():
            some = {name: shapes[name] for name in names}
            check_ranking(some, sparsity[key], scope, None, floor, costs=each)
        return
    floors = floor_counts(shapes, floor)
    if each is not None:
        check_floors(shapes, each, sparsity, floors)
        return
    total = sum(math.prod(shape) for shape in shapes.values())
    if scope == "global":
        most = total - sum(floors.values())
        _check_floor(sparsity, floor, global_count(shapes, sparsity), most)
        return
    for name, count in layer_counts(shapes, sparsity, scope, floor).items():
        _check_floor(sparsity, floor, count, math.prod(shapes[name]) - floors[name])


def _axes(
    noted: Mapping[str, Axes] | None,
    shapes: Mapping[str, tuple[int, ...]],
    model: nn.Module | None,
) -> dict[str, Axes]:
    """Return the input axes of scores, from their model, or from notes about them."""
    if model is not None:
        model_parameters(model, shapes)
        return layer_axes(model, shapes)
    if noted is None:
        return {name: input_axes(shape) for name, shape in shapes.items()}
    for name in shapes:
        if name not in noted:
            raise unknown_axis(name)
    return {name: noted[name] for name in shapes}


def global_count(shapes: Mapping[str, Sequence[int]], sparsity: float) -> int:
    """Return the number of weights to prune, of all parameters."""
    return round(sparsity * sum(math.prod(shape) for shape in shapes.values()))


def layer_counts(
    shapes: Mapping[str, Sequence[int]], sparsity: float, scope: str, floor: float
) -> dict[str, int]:
    """Return the number of weights to prune of each parameter, for `"layer"` and `"erk"`."""
    if scope == "layer":
        return {name: round(sparsity * math.prod(shape)) for name, shape in shapes.items()}
    return _erk(shapes, sparsity, floor_counts(shapes, floor))


def floor_counts(shapes: Mapping[str, Sequence[int]], floor: float) -> dict[str, int]:
    """Return the least number of weights to keep of each parameter."""
    # Rounding of the product must not require one weight more: 0.07 * 100 > 7.
    return {
        name: math.ceil(floor * math.prod(shape) * (1 - 1e-12)) for name, shape in shapes.items()
    }


def _flat(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if not scores:
        raise InvalidArgument("scores must hold at least one parameter, got none")
    flat = {}
    for name, values in scores.items():
        tensor = torch.as_tensor(values, device="cpu").detach()
        if not tensor.is_floating_point() or tensor.numel() == 0:
            raise InvalidArgument(
                "scores must be non-empty floating point tensors, got "
                f"{tensor.dtype} of shape {tuple(tensor.shape)} for {name!r}"
            )
        single = tensor.float().reshape(-1).contiguous()
        if bool(single.max().isnan()):  # that of any is; one pass without memory
            at = int(single.isnan().nonzero()[0])
            raise InvalidArgument(f"scores must not be NaN, got NaN at position {at} of {name!r}")
        flat[name] = single
    return flat


def _erk(
    shapes: Mapping[str, Sequence[int]], sparsity: float, floors: Mapping[str, int]
) -> dict[str, int]:
    """Return pruned counts for densities `ε (sum of dimensions) / (product)`, at most 1.

    Kept counts are rounded for one `ε` (Webster's method), not by largest remainders, so that no
    parameter regains weights when the sparsity rises.
    """
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    dimensions = {name: max(sum(shape), 1) for name, shape in shapes.items()}
    total, least = sum(sizes.values()), sum(floors.values())
    keep = total - round(sparsity * total)
    if least > keep:
        raise InvalidArgument(
            f"sparsity {sparsity} prunes {total - keep} weights, but the floor allows only "
            f"{total - least}"
        )

    def kept_at(epsilon: float) -> dict[str, int]:
        wanted = {name: math.floor(epsilon * dimensions[name] + 0.5) for name in sizes}
        return {name: max(floors[name], min(sizes[name], wanted[name])) for name in sizes}

    low, high = 0.0, 1.0 + max(sizes[name] / dimensions[name] for name in sizes)
    while low < (middle := (low + high) / 2) < high:
        if sum(kept_at(middle).values()) <= keep:
            low = middle
        else:
            high = middle
    kept, above = kept_at(low), kept_at(high)
    # Several counts may step at the same ε: the first parameters get the remaining weights.
    for name in sizes:
        step = min(above[name] - kept[name], keep - sum(kept.values()))
        kept[name] += step
    return {name: sizes[name] - kept[name] for name in sizes}


def _check_floor(sparsity: float, floor: float, count: int, most: int) -> None:
    if count > most:
        raise InvalidArgument(
            f"sparsity {sparsity} prunes {count} weights, but floor={floor} allows only "
            f"{max(most, 0)}"
        )
