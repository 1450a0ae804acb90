"""Check that two models have the same parameters."""

from __future__ import annotations

from torch import nn

from fastsal.errors import InvalidArgument


def check_same(model: nn.Module, dense: nn.Module) -> None:
    """Raise InvalidArgument unless `dense` is another module with the parameters of `model`."""
    if model is dense:
        raise InvalidArgument("dense must be another module than model, got the same one")
    shapes = [{n: tuple(p.shape) for n, p in m.named_parameters()} for m in (model, dense)]
    if shapes[0] != shapes[1]:
        names = [n for n in {**shapes[0], **shapes[1]} if shapes[0].get(n) != shapes[1].get(n)]
        raise InvalidArgument(
            f"dense must have the parameters of model, got another {names[0]!r}: "
            f"{shapes[1].get(names[0])}, not {shapes[0].get(names[0])}"
        )
