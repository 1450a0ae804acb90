"""Modes, flags and random numbers that are restored exactly after a computation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from fastsal.models.evaluating import drop_kept, evaluating
from fastsal.utils.interrupts import uninterrupted
from fastsal.utils.randomness import State, get_random_state, set_random_state


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Use evaluation mode without parameter gradients, then restore every flag."""
    flags = [(value, value.requires_grad) for value in model.parameters()]
    with evaluating(model):
        try:
            for value, _ in flags:
                value.requires_grad_(False)
            yield
        finally:
            with uninterrupted():
                for value, requires_grad in flags:
                    value.requires_grad_(requires_grad)


@contextlib.contextmanager
def replaced(
    model: nn.Module, parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]
) -> Iterator[None]:
    """Replace parameters by other tensors under all their names, then put them back.

    `torch.func.functional_call` leaves the other tensors in a module that has two names: it swaps
    them in once for each name, and puts back in the same order. Values that modules keep of the
    present weights are dropped before and after.

    Args:
        model: The model.
        parameters: Name to parameter of the model.
        values: Name to tensor.
    """
    new = {id(parameters[name]): value for name, value in values.items()}
    slots = [
        (module._parameters, key, value)
        for module in model.modules()
        for key, value in module._parameters.items()
        if id(value) in new
    ]
    drop_kept(model)
    try:
        for owned, key, value in slots:
            owned[key] = new[id(value)]  # type: ignore[assignment]
        yield
    finally:
        with uninterrupted():
            for owned, key, value in slots:
                owned[key] = value
            drop_kept(model)


class PrivateRandomness:
    """A private stream of the global random numbers; the state of the caller is restored."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._state: State | None = None

    @contextlib.contextmanager
    def active(self, *, keep: bool) -> Iterator[None]:
        """Use the private stream in the block; `keep` stores its state for the next block."""
        outer = get_random_state(self._device)
        if self._state is not None:
            set_random_state(self._state, self._device)
        try:
            yield
        finally:
            if keep:
                self._state = get_random_state(self._device)
            set_random_state(outer, self._device)
