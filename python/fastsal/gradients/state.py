"""Puts a model, and the random numbers, back exactly as they were."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import torch
from torch import nn


class FrozenModel:
    """Evaluation mode and no parameter gradients, until `restore`."""

    def __init__(self, model: nn.Module) -> None:
        self._training = [(module, module.training) for module in model.modules()]
        self._requires_grad = [(value, value.requires_grad) for value in model.parameters()]
        # The flags directly: a model's own train() may do more than set them.
        for module, _ in self._training:
            module.training = False
        for value, _ in self._requires_grad:
            value.requires_grad_(False)

    def restore(self) -> None:
        """Give every module and parameter its own flag back."""
        for module, training in self._training:
            module.training = training
        for value, requires_grad in self._requires_grad:
            value.requires_grad_(requires_grad)


class PrivateRandomness:
    """A stream of global random numbers that the caller does not see move."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._state: tuple[torch.Tensor, torch.Tensor | None] | None = None

    @contextlib.contextmanager
    def active(self, *, keep: bool) -> Iterator[None]:
        """Run on the private stream; with `keep` the next run goes on where this one ends."""
        outer = self._get()
        if self._state is not None:
            self._set(self._state)
        try:
            yield
        finally:
            if keep:
                self._state = self._get()
            self._set(outer)

    def _get(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        cuda = torch.cuda.get_rng_state(self._device) if self._device.type == "cuda" else None
        return torch.get_rng_state(), cuda

    def _set(self, state: tuple[torch.Tensor, torch.Tensor | None]) -> None:
        torch.set_rng_state(state[0])
        if state[1] is not None:
            torch.cuda.set_rng_state(state[1], self._device)


@contextlib.contextmanager
def differentiable() -> Iterator[None]:
    """Record a graph whatever the caller has switched off, and run compiled models eagerly."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if "torch._dynamo" in sys.modules:  # only then can anything be compiled
            # A compiled graph would hide the calls inside.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield
