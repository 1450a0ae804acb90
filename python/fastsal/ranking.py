"""From scores to masks: how many weights go, and where.

The count is exact: `round(sparsity * d)` weights go, over all parameters (`"global"`) or in each.
Among equal scores the first in the order of parameters and positions go.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fastsal import _core
from fastsal.errors import InvalidArgument
from fastsal.masks import Masks
from fastsal.patterns import Pattern, expand_groups, group_scores, input_axes

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
    _check_fraction("floor", floor)
    if scope not in SCOPES:
        raise InvalidArgument(f"scope: got {scope!r}; takes {', '.join(map(repr, SCOPES))}")
    scores = {name: torch.as_tensor(values) for name, values in scores.items()}
    flat = _flat(scores)
    recipe: dict[str, object] = {"scope": scope, "floor": floor}
    wanted = None if pattern is None else Pattern.parse(pattern)
    if wanted is not None and wanted.is_whole:
        groups = rank(group_scores(scores, wanted.m), sparsity, scope=scope, floor=floor)
        whole = {
            name: expand_groups(groups[name], values.shape, wanted.m)
            for name, values in scores.items()
        }
        return Masks(whole, {**groups.recipe, "pattern": str(wanted)})
    if wanted is not None:
        n, m = wanted.n, wanted.m
        check_fixed(wanted, sparsity, floor)
        recipe = {"pattern": pattern}
        kept = {}
        for name, values in flat.items():
            kept[name] = _core.n_of_m(values.numpy(), input_axes(scores[name].shape), n, m)
    else:
        if sparsity is None:
            raise InvalidArgument("sparsity: is missing; takes a fraction from 0 to 1")
        _check_fraction("sparsity", sparsity)
        recipe["sparsity"] = sparsity
        sizes = {name: values.numel() for name, values in flat.items()}
        # Rounding of the product must not ask for one weight more: 0.07 * 100 > 7.
        floors = {name: math.ceil(floor * size * (1 - 1e-12)) for name, size in sizes.items()}
        if scope == "global":
            count = round(sparsity * sum(sizes.values()))
            _check_floor(sparsity, floor, count, sum(sizes.values()) - sum(floors.values()))
            arrays = [values.numpy() for values in flat.values()]
            needed = list(floors.values()) if floor > 0 else []
            masks, threshold = _core.prune_smallest(arrays, count, needed)
            kept = dict(zip(flat, masks, strict=True))
            recipe["threshold"] = threshold
        else:
            counts = (
                {name: round(sparsity * size) for name, size in sizes.items()}
                if scope == "layer"
                else _erk(scores, sparsity, floors)
            )
            kept = {}
            for name, values in flat.items():
                most = sizes[name] - floors[name]
                _check_floor(sparsity, floor, counts[name], most)
                kept[name] = _core.prune_smallest([values.numpy()], counts[name], [])[0][0]
    masks_ = {
        name: torch.from_numpy(mask).reshape(scores[name].shape) for name, mask in kept.items()
    }
    return Masks(masks_, recipe)


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
    scores: Mapping[str, Tensor], sparsity: float, floors: Mapping[str, int]
) -> dict[str, int]:
    """Pruned counts: density `ε (sum of dimensions) / (product of dimensions)`, at most 1.

    Kept counts are rounded for one `ε` (Webster's method) rather than by largest remainders, so
    that no parameter gets weights back when the sparsity rises.
    """
    sizes = {name: values.numel() for name, values in scores.items()}
    dimensions = {name: max(sum(values.shape), 1) for name, values in scores.items()}
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


def _check_floor(sparsity: float, floor: float, count: int, most: int) -> None:
    if count > most:
        raise InvalidArgument(
            f"sparsity: {sparsity} would prune {count} weights, but floor={floor} leaves "
            f"only {max(most, 0)} to prune"
        )
