"""Windows: the modules whose outputs are matched with those of the dense model.

A window spans at least one nonlinearity, so that an error of one layer can be undone by the next;
matching matrix by matrix cannot (SNOWS, Lucas and Mazumder, ICLR 2025, section 3).

Axes: n images; the outputs of a window have any further axes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from torch import Tensor, nn

from fastsal.models.hooks import hooked

_CONTAINERS = (nn.Sequential, nn.ModuleList)


def find_blocks(model: nn.Module) -> list[str]:
    """Return the names of the residual or transformer blocks of a model.

    A block is a member of a `Sequential` or `ModuleList` with two or more layers that have a weight
    matrix, and without such a block inside: `layer1.0` of a ResNet, `blocks.0` of a ViT. Models
    that are one flat sequence of layers have none.
    """
    members = {
        id(child)
        for module in model.modules()
        if isinstance(module, _CONTAINERS)
        for child in module.children()
    }
    found = {
        name: module
        for name, module in model.named_modules()
        if id(module) in members
        and not isinstance(module, _CONTAINERS)
        and len(_weights(module)) >= 2
    }
    blocks = {id(module) for module in found.values()}
    return [
        name
        for name, module in found.items()
        if not any(id(below) in blocks for below in module.modules() if below is not module)
    ]


def _weights(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.ndim >= 2]


@contextlib.contextmanager
def capturing(model: nn.Module, names: list[str]) -> Iterator[dict[str, Tensor]]:
    """Collect the outputs of modules in a dict, replaced at every call of the model.

    If a module returns several values, its first tensor is taken.
    """
    caught: dict[str, Tensor] = {}

    def catch(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: object, out: object) -> None:
            first = _first_tensor(out)
            if first is not None:
                caught[name] = first

        return hook

    with hooked(model.get_submodule(name).register_forward_hook(catch(name)) for name in names):
        yield caught


def _first_tensor(out: object) -> Tensor | None:
    if isinstance(out, Tensor):
        return out
    if isinstance(out, dict):
        out = tuple(out.values())
    if isinstance(out, (tuple, list)):
        return next((t for t in map(_first_tensor, out) if t is not None), None)
    return None
