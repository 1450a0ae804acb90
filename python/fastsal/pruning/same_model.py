"""Check that two models have the same parameters."""

from __future__ import annotations

from torch import nn

from fastsal.errors import InvalidArgument


def check_same(model: nn.Module, dense: nn.Module, *, may_be_narrower: bool = False) -> None:
    """Raise InvalidArgument unless `dense` is another module with the parameters of `model`.

    Args:
        model: The pruned model.
        dense: The dense model.
        may_be_narrower: Whether parameters of `model` may be smaller, as after the removal of
            units.
    """
    if model is dense:
        raise InvalidArgument("dense must be another module than model, got the same one")
    found, wanted = ({n: tuple(p.shape) for n, p in m.named_parameters()} for m in (model, dense))

    def fits(name: str) -> bool:
        a, b = found.get(name), wanted.get(name)
        if not may_be_narrower or a is None or b is None:
            return a == b
        return len(a) == len(b) and all(x <= y for x, y in zip(a, b, strict=True))

    for name in {**found, **wanted}:
        if not fits(name):
            size = ", in the same or in larger sizes" if may_be_narrower else ""
            raise InvalidArgument(
                f"dense must have the parameters of model{size}, got another {name!r}: "
                f"{wanted.get(name)}, not {found.get(name)}"
            )
