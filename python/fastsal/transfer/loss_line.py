"""Loss and accuracy along the straight line between two states of a model.

After Goodfellow, Vinyals & Saxe (2015), "Qualitatively characterizing neural network optimization
problems", who draw the line between the start and the end of training.

Between a dense and a pruned model it shows how far the quadratic picture of the loss holds; between
a pruned and a fine-tuned one, whether both lie in one basin.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastsal.errors import InvalidArgument, UnknownParameter

# measure(model) -> accuracy, loss and, as `fastsal.transfer.measure` gives it, anything more
Measure = Callable[[nn.Module], tuple[Any, ...]]


@dataclass(frozen=True)
class Point:
    """One model on the line.

    Attributes:
        t: its place, 0 at the start, 1 at the end.
        loss: as measured.
        accuracy: as measured.
    """

    t: float
    loss: float
    accuracy: float


def line(
    model: nn.Module,
    start: Mapping[str, Tensor],
    end: Mapping[str, Tensor],
    measure: Measure,
    points: int = 11,
) -> list[Point]:
    """Measure a model at evenly spaced places of the line `(1 − t) · start + t · end`.

    Args:
        model: the module; has the weights, buffers and modes that it came with after, also after an
            error.
        start: state at t = 0, names and tensors as in `model.state_dict()`. What both states leave
            out stays as the model has it.
        end: state at t = 1, of the same names.
        measure: takes the model, returns `(accuracy, loss, ...)`: `fastsal.transfer.measure` with
            batches, say.
        points: 2 or more.

    Floating-point parameters and buffers (running moments too) are interpolated, in float64;
    others, counters say, are those of the nearer end. At the ends every tensor is exactly that of
    the state.

    Returns:
        One entry a place, t rising from 0 to 1.

    Raises:
        UnknownParameter: a name that the model has not, or that only one of the states has.
        InvalidArgument: a shape that is not the model's, or fewer than two points.
    """
    if isinstance(points, bool) or not isinstance(points, int) or points < 2:
        raise InvalidArgument(f"points: got {points!r}; takes 2 or more")
    own = model.state_dict(keep_vars=True)
    for what, state in (("start", start), ("end", end)):
        _check(what, state, own)
    lone = sorted(set(start) ^ set(end))
    if lone:
        raise UnknownParameter(
            f"end: {lone[0]!r} is in one of the states only; takes states of the same names"
        )
    found = []
    # The states may be views of the model's own tensors, which change on the way.
    first, last = _copied(start), _copied(end)
    with _restored(model, {name: own[name] for name in first}) as moved:
        for i in range(points):
            t = i / (points - 1)
            with torch.no_grad():
                for name, tensor in moved.items():
                    tensor.copy_(_between(first[name], last[name], t))
            accuracy, loss, *_ = measure(model)
            found.append(Point(t, float(loss), float(accuracy)))
    return found


def _check(what: str, state: Mapping[str, Tensor], own: Mapping[str, Any]) -> None:
    for name, value in state.items():
        if not isinstance(own.get(name), Tensor):
            raise UnknownParameter(f"{what}: {name!r} is no tensor of the model's state")
        if value.shape != own[name].shape:
            raise InvalidArgument(
                f"{what}: {name!r} has shape {list(value.shape)}; the model's is "
                f"{list(own[name].shape)}"
            )


def _copied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in state.items()}


def _between(a: Tensor, b: Tensor, t: float) -> Tensor:
    if t in (0.0, 1.0) or not a.is_floating_point():
        return a if t < 0.5 else b
    return torch.lerp(a.double(), b.to(a.device).double(), t)


@contextlib.contextmanager
def _restored(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[Mapping[str, Tensor]]:
    """Give tensors their values, and modules their modes, back."""
    values = _copied(tensors)
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield tensors
    finally:
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(values[name])
        for module, mode in modes:
            module.training = mode
