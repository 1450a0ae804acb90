"""Proof that units can be removed: a model without them computes what it does with zeros for them.

On real images, half of the units of each group, a random half, are removed on one side, and
silenced by zeros in the consumers' weights on the other. The outputs of all consumers and all those
of the model must agree. So they must for the other half: what depends on a single unit, such as the
largest one, may be the same without one of the halves. A group that fails, or with which the model
does not run, is left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastsal.gradients.precision import convolutions_in_float32, full_float32
from fastsal.models.evaluating import evaluating, pair_of, to_model
from fastsal.models.hooks import hooked
from fastsal.models.outputs import tensors_within
from fastsal.pruning.structured.groups import Group, cut, restored, silence, tensor_of
from fastsal.utils.float64 import in_float64
from fastsal.utils.plain_text import first_line

# Largest difference of an output, relative to the largest value of that output.
TOLERANCE = 1e-4
# The same in machine epsilons, for models of 16 bits.
_EPSILONS = 8


def proven(
    model: nn.Module, groups: Sequence[Group], images: Tensor
) -> tuple[list[Group], dict[str, str]]:
    """Return the groups whose units can be removed, and for the others the reason why not.

    Args:
        model: The model; it is as before at the end.
        groups: Candidates.
        images: `[n, ...]`; two are used.
    """
    images = pair_of(images)
    if not groups or _failure(model, groups, images) is None:
        return list(groups), {}
    left_out: dict[str, str] = {}
    for group in groups:
        why = _failure(model, [group], images)
        if why is not None:
            left_out[group.name] = why
    kept = [group for group in groups if group.name not in left_out]
    # Each alone is proven; rounding errors of many at once may add up to more than the tolerance.
    why = _failure(model, kept, images, tolerance=math.inf) if kept else None
    if why is not None:
        return [], {**left_out, **{group.name: why for group in kept}}
    return kept, left_out


def _failure(
    model: nn.Module, groups: Sequence[Group], images: Tensor, tolerance: float = TOLERANCE
) -> str | None:
    """Return why units of groups cannot be removed; None if they can."""
    draw = torch.Generator().manual_seed(0)
    one, other = [], []
    for group in groups:
        order = torch.randperm(group.units, generator=draw, device="cpu")
        half = max(1, group.units // 2)
        one.append((group, order[:half].sort().values))
        other.append((group, order[-half:].sort().values))
    why = _failure_of(model, one, images, tolerance)
    return _failure_of(model, other, images, tolerance) if why is None else why


def _failure_of(
    model: nn.Module, cuts: Sequence[tuple[Group, Tensor]], images: Tensor, tolerance: float
) -> str | None:
    """Return why groups cannot keep these units alone; None if they can."""
    groups = [group for group, _ in cuts]
    kept = {name: (group, keep) for group, keep in cuts for name in group.producers}
    with restored(model):
        _stir(model, groups)
        silence(model, cuts)
        wanted = _outputs(model, groups, images)
    try:
        with restored(model):
            _stir(model, groups)
            cut(model, cuts)
            found = _outputs(model, groups, images)
    except Exception as error:  # whatever a model raises that does not run with fewer units
        return f"the model does not run without them ({type(error).__name__}: {first_line(error)})"
    coarsest = max(torch.finfo(p.dtype).eps for p in model.parameters() if p.is_floating_point())
    most = max(tolerance, _EPSILONS * coarsest)
    for name, whole in wanted.items():
        other = found.get(name)
        is_layer = isinstance(name, str)
        where = f"the output of {name!r}" if is_layer else "an output of the model"
        # A layer that produces units of another group has fewer outputs.
        value = _rows(model, name, whole, *kept[name]) if name in kept else whole
        if other is None or other.shape != value.shape:
            return f"without them {where} has another shape"
        if bool(value.isnan().any()):
            return f"{where} is NaN on these images"
        # Infinities are equal or not, such as those of a mask.
        apart, scale = (other - value)[other != value].abs(), value[value.isfinite()].abs()
        if len(apart) and not float(apart.max()) <= most * float(scale.max() if len(scale) else 0):
            return f"without them {where} is not as with zeros"
    return None


def _stir(model: nn.Module, groups: Sequence[Group]) -> None:
    """Change what acts between the layers of groups and has the same value everywhere.

    At their initial values, such as zero, some operations that mix units do nothing.
    """
    draw = torch.Generator().manual_seed(1)
    for group in groups:
        layers = {*group.producers, *group.consumers}
        for part in group.slices:
            value = tensor_of(model, part)
            is_between = part.module not in layers and group.kind != "heads"
            if (
                is_between
                and value.is_floating_point()
                and bool((value == value.flatten()[0]).all())
            ):
                change = (
                    torch.rand(value.shape, generator=draw, dtype=torch.float32, device="cpu") + 1
                ) / 10
                value.data = value.data + change.to(value.device, value.dtype)


def _rows(model: nn.Module, name: str, value: Tensor, group: Group, kept: Tensor) -> Tensor:
    """Return the outputs of a producer for the units that are kept."""
    (part,) = [s for s in group.slices if s.module == name and s.tensor == "weight" and not s.axis]
    places = part.index[kept].flatten().sort().values
    axis = value.dim() - 1 if isinstance(model.get_submodule(name), nn.Linear) else 1
    return value.index_select(axis, places)


def _outputs(model: nn.Module, groups: Sequence[Group], images: Tensor) -> dict[str | int, Tensor]:
    """Return the outputs of all consumers, and by their number those of the model, in float64.

    TF32 is off: its errors, which depend on the number of units, are above the tolerance.
    """
    caught: dict[str | int, Tensor] = {}

    def catch(name: str) -> Any:
        return lambda _, __, result: caught.__setitem__(name, in_float64(result.detach().cpu()))

    names = {name for group in groups for name in group.consumers}
    with (
        hooked(model.get_submodule(name).register_forward_hook(catch(name)) for name in names),
        evaluating(model),
        torch.no_grad(),
        torch.random.fork_rng(devices=[]),
        full_float32(),
        convolutions_in_float32(),
    ):
        result = model(to_model(images, model))
    caught.update(
        (number, in_float64(output.cpu())) for number, output in enumerate(tensors_within(result))
    )
    return caught
