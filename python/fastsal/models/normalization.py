"""The normalization layers of a model."""

from __future__ import annotations

from torch import nn

_NORMALIZATION = (
    nn.modules.batchnorm._NormBase,  # batch and instance normalization
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
)


def normalization_layers(model: nn.Module) -> list[nn.Module]:
    """Return the normalization layers of PyTorch, and others by name.

    A module is a normalization layer by name, such as `RmsNorm` of timm, if its class name contains
    `Norm` and its parameters are vectors. Larger blocks have parameters with more axes.
    """
    return [
        module
        for module in model.modules()
        if isinstance(module, _NORMALIZATION)
        or ("Norm" in type(module).__name__ and all(p.ndim <= 1 for p in module.parameters()))
    ]
