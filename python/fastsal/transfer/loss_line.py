"""Loss and accuracy along the straight line between two states of a model.

Goodfellow, Vinyals and Saxe (2015), "Qualitatively characterizing neural network optimization
problems", evaluate the loss on the line between the start and the end of training.

Between a dense and a pruned model, the line shows how far the quadratic approximation of the loss
is valid; between a pruned and a fine-tuned model, whether both are in the same basin.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastsal.errors import InvalidArgument, UnknownParameter
from fastsal.models.evaluating import modes_restored
from fastsal.models.wrappers import unwrapped, with_names_of
from fastsal.utils.float64 import in_float64
from fastsal.utils.interrupts import uninterrupted
from fastsal.utils.numbers import whole

# measure(model) -> (accuracy, loss, ...), for example `fastsal.transfer.measure`
Measure = Callable[[nn.Module], tuple[Any, ...]]


@dataclass(frozen=True)
class LinePoint:
    """Loss and accuracy at one point of the line.

    Attributes:
        t: Position, 0 at the start, 1 at the end.
        loss: Measured loss.
        accuracy: Measured accuracy.
    """

    t: float
    loss: float
    accuracy: float


def measure_line(
    model: nn.Module,
    start: Mapping[str, Tensor],
    end: Mapping[str, Tensor],
    measure: Measure,
    points: int = 11,
) -> list[LinePoint]:
    """Measure a model at evenly spaced points of the line `(1 − t) · start + t · end`.

    Floating-point parameters and buffers (including running statistics) are interpolated in
    float64; other tensors, such as counters, are those of the nearer end. At t = 0 and t = 1 every
    tensor equals that of the state exactly.

    Args:
        model: Module to measure; its weights, buffers and modes are restored, also after an error.
        start: State at t = 0, as returned by `model.state_dict()`. Tensors that are in neither
            state are not changed.
        end: State at t = 1, with the names of `start`.
        measure: Function of the model that returns `(accuracy, loss, ...)`, for example
            `fastsal.transfer.measure` with its batches bound.
        points: Number of points, at least 2.

    Returns:
        One entry per point, with t increasing from 0 to 1.

    Raises:
        UnknownParameter: A name is not in the model, or is in one of the states only.
        InvalidArgument: A shape differs from that of the model, or `points` is below 2.
    """
    points = whole("points", points, 2)
    own = unwrapped(model).state_dict(keep_vars=True)
    start, end = with_names_of(start, own), with_names_of(end, own)
    for what, state in (("start", start), ("end", end)):
        _check(what, state, own)
    lone = sorted(set(start) ^ set(end))
    if lone:
        raise UnknownParameter(
            f"start and end must have the same names; {lone[0]!r} is in one of them only"
        )
    found = []
    # The states may share memory with the model, whose tensors are overwritten below.
    first, last = _copied(start), _copied(end)
    with _restored(model, {name: own[name] for name in first}) as moved:
        for i in range(points):
            t = i / (points - 1)
            with torch.no_grad():
                for name, tensor in moved.items():
                    tensor.copy_(_between(first[name], last[name], t))
            accuracy, loss, *_ = measure(model)
            found.append(LinePoint(t, float(loss), float(accuracy)))
    return found


def _check(what: str, state: Mapping[str, Tensor], own: Mapping[str, Any]) -> None:
    for name, value in state.items():
        if not isinstance(own.get(name), Tensor):
            raise UnknownParameter(f"{what}: {name!r} is not in the state of the model")
        if value.shape != own[name].shape:
            raise InvalidArgument(
                f"{what}: shape of {name!r} must be {list(own[name].shape)}, got "
                f"{list(value.shape)}"
            )


def _copied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in state.items()}


def _between(a: Tensor, b: Tensor, t: float) -> Tensor:
    if t in (0.0, 1.0) or not a.is_floating_point():
        return a if t < 0.5 else b
    return torch.lerp(in_float64(a), in_float64(b.to(a.device)), t)


@contextlib.contextmanager
def _restored(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[Mapping[str, Tensor]]:
    """Restore the values of tensors and the modes of modules on exit."""
    values = _copied(tensors)
    with modes_restored(model):
        try:
            yield tensors
        finally:
            with torch.no_grad(), uninterrupted():
                for name, tensor in tensors.items():
                    tensor.copy_(values[name])
