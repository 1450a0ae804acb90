"""From scores to masks: how many weights go, and where.

The count is exact: `round(sparsity * d)` weights go, over all parameters (`"global"`) or in each.
Among equal scores the first in the order of parameters and positions go.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

import fastsal._core as _core
from fastsal.errors import InvalidArgument
from fastsal.pruning.masks.masks import Masks
from fastsal.pruning.masks.patterns import (
    Pattern,
    _check_fraction,
    check_fixed,
    expand_groups,
    group_scores,
    input_axes,
)

SCOPES = ("global", "layer", "erk")


def rank(
    scores: Mapping[str, Tensor],
    sparsity: float | None = None,
    scope: str = "global",
    pattern: str | None = None,
    floor: float = 0.0,
) -> Masks:
    """Turn scores into masks.

    Args:
        scores: Name to scores, low = prune first, of any shapes; floating point, no NaN.
        sparsity: Fraction of weights that go, in `[0, 1]`. With a pattern it may be left out.
        scope: `"global"`: one threshold over all parameters; `"layer"`: the same fraction of
            each; `"erk"`: Erdős-Rényi kernel densities (Evci et al. 2020, RigL, section 3),
            proportional to the sum of a parameter's dimensions over their product.
        pattern: `"N:M"`: the N best of every M along the input axis (axis 1) are kept; a short
            last group of r keeps `ceil(r N / M)`. It fixes the sparsity; `scope` is not used.
            `"1xM"`: M neighbours stay or go together, by the sum of their scores; sparsity and
            floor count groups. (`rank_pattern` judges groups by their joint cost instead.)
        floor: Least kept fraction of any parameter, rounded up to whole weights.

    Returns:
        The masks; `masks.recipe` says how they came about.

    Raises:
        InvalidArgument: A fraction outside `[0, 1]`, a sparsity that the floor does not allow,
            an unknown scope or pattern, scores that are empty or NaN.
    """
    scores = {name: torch.as_tensor(values) for name, values in scores.items()}
    flat = _flat(scores)
    shapes = {name: tuple(values.shape) for name, values in scores.items()}
    check_ranking(shapes, sparsity, scope, pattern, floor)
    recipe: dict[str, object] = {"scope": scope, "floor": floor}
    wanted = None if pattern is None else Pattern.parse(pattern)
    if wanted is not None and wanted.is_whole:
        groups = rank(group_scores(scores, wanted.m), sparsity, scope=scope, floor=floor)
        whole = {
            name: expand_groups(groups[name], values.shape, wanted.m)
            for name, values in scores.items()
        }
        return Masks(whole, {**groups.recipe, "pattern": str(wanted)})
    kept = {}
    if wanted is not None:
        recipe = {"pattern": pattern}
        for name, values in flat.items():
            axes = input_axes(shapes[name])
            kept[name] = _core.n_of_m(values.numpy(), axes, wanted.n, wanted.m)
    elif sparsity is not None:
        recipe["sparsity"] = sparsity
        if scope == "global":
            count = global_count(shapes, sparsity)
            floors = floor_counts(shapes, floor)
            arrays = [values.numpy() for values in flat.values()]
            needed = list(floors.values()) if floor > 0 else []
            masks, threshold = _core.prune_smallest(arrays, count, needed)
            kept = dict(zip(flat, masks, strict=True))
            recipe["threshold"] = threshold
        else:
            counts = layer_counts(shapes, sparsity, scope, floor)
            for name, values in flat.items():
                kept[name] = _core.prune_smallest([values.numpy()], counts[name], [])[0][0]
    masks_ = {name: torch.from_numpy(mask).reshape(shapes[name]) for name, mask in kept.items()}
    return Masks(masks_, recipe)


def check_ranking(
    shapes: Mapping[str, Sequence[int]],
    sparsity: float | None,
    scope: str = "global",
    pattern: str | None = None,
    floor: float = 0.0,
) -> None:
    """Raise InvalidArgument for what `rank` would refuse for scores of these shapes."""
    _check_fraction("floor", floor)
    if scope not in SCOPES:
        raise InvalidArgument(f"scope: got {scope!r}; takes {', '.join(map(repr, SCOPES))}")
    wanted = None if pattern is None else Pattern.parse(pattern)
    if wanted is not None and wanted.is_whole:
        groups = {}
        for name, shape in shapes.items():
            outer, width, inner = input_axes(tuple(shape))
            groups[name] = (outer, -(-width // wanted.m), inner)
        check_ranking(groups, sparsity, scope, None, floor)
        return
    if wanted is not None:
        check_fixed(wanted, sparsity, floor)
        return
    if sparsity is None:
        raise InvalidArgument("sparsity: is missing; takes a fraction from 0 to 1")
    _check_fraction("sparsity", sparsity)
    floors = floor_counts(shapes, floor)
    total = sum(math.prod(shape) for shape in shapes.values())
    if scope == "global":
        most = total - sum(floors.values())
        _check_floor(sparsity, floor, global_count(shapes, sparsity), most)
        return
    for name, count in layer_counts(shapes, sparsity, scope, floor).items():
        _check_floor(sparsity, floor, count, math.prod(shapes[name]) - floors[name])


def global_count(shapes: Mapping[str, Sequence[int]], sparsity: float) -> int:
    """Weights that go, of all parameters."""
    return round(sparsity * sum(math.prod(shape) for shape in shapes.values()))


def layer_counts(
    shapes: Mapping[str, Sequence[int]], sparsity: float, scope: str, floor: float
) -> dict[str, int]:
    """Weights that go of each parameter, where each has a count of its own."""
    if scope == "layer":
        return {name: round(sparsity * math.prod(shape)) for name, shape in shapes.items()}
    return _erk(shapes, sparsity, floor_counts(shapes, floor))


def floor_counts(shapes: Mapping[str, Sequence[int]], floor: float) -> dict[str, int]:
    """Least kept weights of each parameter."""
    # Rounding of the product must not ask for one weight more: 0.07 * 100 > 7.
    return {
        name: math.ceil(floor * math.prod(shape) * (1 - 1e-12)) for name, shape in shapes.items()
    }


def _flat(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if not scores:
        raise InvalidArgument("scores: is empty; takes name to tensor")
    flat = {}
    for name, values in scores.items():
        tensor = torch.as_tensor(values).detach().cpu()
        if not tensor.is_floating_point() or tensor.numel() == 0:
            raise InvalidArgument(
                f"scores: {name!r} is {tensor.dtype} of shape {tuple(tensor.shape)}; takes "
                "floating point tensors that are not empty"
            )
        single = tensor.float().reshape(-1).contiguous()
        nan = torch.isnan(single)
        if bool(nan.any()):
            at = int(nan.nonzero()[0])
            raise InvalidArgument(f"scores: {name!r} is NaN at position {at}; takes numbers")
        flat[name] = single
    return flat


def _erk(
    shapes: Mapping[str, Sequence[int]], sparsity: float, floors: Mapping[str, int]
) -> dict[str, int]:
    """Pruned counts: density `ε (sum of dimensions) / (product of dimensions)`, at most 1.

    Kept counts are rounded for one `ε` (Webster's method) rather than by largest remainders, so
    that no parameter gets weights back when the sparsity rises.
    """
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    dimensions = {name: max(sum(shape), 1) for name, shape in shapes.items()}
    keep = sum(sizes.values()) - round(sparsity * sum(sizes.values()))
    if sum(floors.values()) > keep:
        raise InvalidArgument("floor: leaves too few weights to prune for this sparsity")

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
    # Several counts may step at the same ε: the first parameters take what is left.
    for name in sizes:
        step = min(above[name] - kept[name], keep - sum(kept.values()))
        kept[name] += step
    return {name: sizes[name] - kept[name] for name in sizes}


def _check_floor(sparsity: float, floor: float, count: int, most: int) -> None:
    if count > most:
        raise InvalidArgument(
            f"sparsity: {sparsity} would prune {count} weights, but floor={floor} leaves "
            f"only {max(most, 0)} to prune"
        )
