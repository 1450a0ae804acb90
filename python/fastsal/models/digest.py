"""Digests of models: of their architecture, and of their weights too."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import Tensor, nn

from fastsal.models.wrappers import unwrapped
from fastsal.utils.digests import Digest


def structure_digest(model: nn.Module) -> str:
    """Return the SHA-256, in hex, of the modules of a model.

    A module contributes its name, its type and the settings in its repr (strides, slopes), so that
    equal weights in different architectures have different digests.
    """
    return _structure(model).hexdigest()


def model_digest(model: nn.Module, without: Iterable[Tensor] = ()) -> str:
    """Return the SHA-256, in hex, of the modules, parameters and buffers of a model.

    Args:
        model: Any module.
        without: Parameters and buffers that are left out.
    """
    model = unwrapped(model)
    left_out = set(map(id, without))
    digest = _structure(model)
    for kind, tensors in (
        ("parameter", model.named_parameters(remove_duplicate=False)),
        ("buffer", model.named_buffers(remove_duplicate=False)),
    ):
        for name, tensor in tensors:
            if id(tensor) in left_out:
                continue
            digest.tensor(f"{kind} {name}", tensor)
    return digest.hexdigest()


def _structure(model: nn.Module) -> Digest:
    digest = Digest()
    for name, module in unwrapped(model).named_modules():
        # Memory addresses differ between runs.
        settings = re.sub(r" at 0x[0-9a-fA-F]+", "", module.extra_repr())
        digest.text(f"{name}\0{type(module).__qualname__}\0{settings}\0")
    return digest
