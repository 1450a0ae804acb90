"""Selection of the trained parameters: head, normalization and named parameters are frozen."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import Tensor, nn

from fastsal.errors import InvalidArgument, UnknownParameter
from fastsal.models.classifier import find_head
from fastsal.models.evaluating import modes_restored, set_modes
from fastsal.models.normalization import normalization_layers
from fastsal.models.wrappers import plain_name, unwrapped
from fastsal.utils.interrupts import uninterrupted
from fastsal.utils.suggestions import did_you_mean


def trained_parameters(
    model: nn.Module,
    frozen: str | Sequence[str] = (),
    *,
    train_head: bool = False,
    train_normalization: bool = False,
    images: Tensor | None = None,
) -> dict[str, nn.Parameter]:
    """Return the parameters to train: those that require gradients and are not frozen.

    Args:
        model: Any module, or a wrapper of it, whose segments in names are left out.
        frozen: Names or `fnmatch` patterns of parameters to freeze.
        train_head: Whether to train the head, see `find_head`.
        train_normalization: Whether to train the scales and shifts of normalization layers.
        images: `[n, ...]`, by which the head is found; None makes up images.

    Returns:
        Name to parameter, in the order of `model.named_parameters()`.

    Raises:
        UnknownParameter: A name or a pattern matches no parameter.
        InvalidArgument: No parameter is left to train, or no head is found to freeze.
    """
    model = unwrapped(model)
    owned = dict(model.named_parameters())
    still: set[nn.Parameter] = set()
    if not train_head:
        still.update(p for module in find_head(model, images) for p in module.parameters())
    if not train_normalization:
        still.update(p for module in normalization_layers(model) for p in module.parameters())
    for pattern in [frozen] if isinstance(frozen, str) else frozen:
        spellings = (pattern, plain_name(pattern))
        found = ([p for n, p in owned.items() if fnmatchcase(n, each)] for each in spellings)
        hits = next((each for each in found if each), None)
        if not hits:
            raise UnknownParameter(
                f"frozen: {pattern!r} matches no parameter of the model"
                f"{did_you_mean(pattern, owned, cutoff=0.4)}"
            )
        still.update(hits)
    trained = {name: p for name, p in owned.items() if p.requires_grad and p not in still}
    if not trained:
        raise InvalidArgument(
            "frozen: no parameter is left to train; train_head and train_normalization train head "
            "and normalization, and parameters with requires_grad=False are never trained"
        )
    return trained


@contextlib.contextmanager
def training_only(
    model: nn.Module, trained: Mapping[str, nn.Parameter], *, train_normalization: bool
) -> Iterator[None]:
    """Use training mode, with gradients for `trained` only, then restore modes and gradients.

    Frozen normalization layers are in evaluation mode, so that their running statistics do not
    change.
    """
    found = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    chosen = set(trained.values())
    with modes_restored(model):
        try:
            set_modes(model, True)
            for layer in normalization_layers(model):
                own = list(layer.parameters())
                if not train_normalization or (own and chosen.isdisjoint(own)):
                    layer.training = False
            for p, _, _ in found:
                p.requires_grad_(p in chosen)
                p.grad = None
            yield
        finally:
            with uninterrupted():
                for p, needed, gradient in found:
                    p.requires_grad_(needed)
                    p.grad = gradient
