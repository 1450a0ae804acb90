"""What a fine-tuning trains and what it leaves alone: head, normalisation, and what is named."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn

from fastsal.errors import InvalidArgument, UnknownParameter
from fastsal.models.classifier import find_head

_NORMALISATION = (
    nn.modules.batchnorm._NormBase,  # batch and instance normalisation
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
)


def trained_parameters(
    model: nn.Module,
    frozen: str | Sequence[str] = (),
    *,
    train_head: bool = False,
    train_normalisation: bool = False,
) -> dict[str, nn.Parameter]:
    """Choose what is trained: all that needs gradients but for what is frozen.

    Args:
        model: Any module.
        frozen: Names, or `fnmatch` patterns of names, of parameters that stay as they are.
        train_head: Whether the head (see `find_head`) is trained.
        train_normalisation: Whether scales and shifts of normalisation layers are.

    Returns:
        Name to parameter, in the order of `model.named_parameters()`.

    Raises:
        UnknownParameter: A name or a pattern matches nothing.
        InvalidArgument: Nothing is left to train, or no head is found to freeze.
    """
    owned = dict(model.named_parameters())
    still: set[nn.Parameter] = set()
    if not train_head:
        still.update(p for module in find_head(model) for p in module.parameters())
    if not train_normalisation:
        still.update(p for module in normalisation_layers(model) for p in module.parameters())
    for pattern in [frozen] if isinstance(frozen, str) else frozen:
        hits = [p for name, p in owned.items() if fnmatchcase(name, pattern)]
        if not hits:
            close = difflib.get_close_matches(pattern, owned, n=3, cutoff=0.4)
            hint = f"; close: {', '.join(close)}" if close else ""
            raise UnknownParameter(f"frozen: {pattern!r} matches no parameter of the model{hint}")
        still.update(hits)
    trained = {name: p for name, p in owned.items() if p.requires_grad and p not in still}
    if not trained:
        raise InvalidArgument(
            "frozen: leaves nothing to train; head and normalisation are trained with train_head "
            "and train_normalisation, and parameters that need no gradient never"
        )
    return trained


def normalisation_layers(model: nn.Module) -> list[nn.Module]:
    """Return torch's normalisation layers, and others that are called so.

    Those, timm's `RmsNorm` say, have `Norm` in the name of their class and vectors only as
    parameters; a block that has it in its name holds weights of more axes.
    """
    return [
        module
        for module in model.modules()
        if isinstance(module, _NORMALISATION)
        or ("Norm" in type(module).__name__ and all(p.ndim <= 1 for p in module.parameters()))
    ]


@contextlib.contextmanager
def training_only(
    model: nn.Module, trained: Mapping[str, nn.Parameter], *, train_normalisation: bool
) -> Iterator[None]:
    """Put a model in training mode with gradients for `trained` alone.

    Normalisation that is not trained is in evaluation mode: running moments stay as they are. After
    the block modes, flags and gradients are those of before.
    """
    modes = [(module, module.training) for module in model.modules()]
    found = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    chosen = set(trained.values())
    try:
        model.train()
        for layer in normalisation_layers(model):
            own = list(layer.parameters())
            if not train_normalisation or (own and chosen.isdisjoint(own)):
                layer.training = False
        for p, _, _ in found:
            p.requires_grad_(p in chosen)
            p.grad = None
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for p, needed, gradient in found:
            p.requires_grad_(needed)
            p.grad = gradient
