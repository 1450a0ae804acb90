"""Models that are wrapped or sharded, with whole weights while statistics are collected.

A weight takes four bytes, its sums 130 or more, so only the sums must be divided among processes. A
model sharded by FSDP2 or tensor parallelism is gathered during the passes, and then sharded again
with its new weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastsal.errors import UnsupportedLayer
from fastsal.models.wrappers import unwrapped
from fastsal.utils.interrupts import uninterrupted


@contextlib.contextmanager
def whole_weights(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the model inside a wrapper, with all weights on every rank.

    Weights may be changed in place inside the block. Sharded weights get the changes after it. The
    settings of FSDP are unchanged, and weights that it had gathered are gathered again.

    Raises:
        UnsupportedLayer: Weights are sharded in an unsupported way.
    """
    model = unwrapped(model)
    gathered = _resharded(model)
    sharded = {n: p for n, p in model.named_parameters() if _is_sharded(p)}
    if not sharded:
        yield model
        return
    for name, p in sharded.items():
        if _shards(p) > 1:
            raise UnsupportedLayer(
                "model must use at most one of DistributedDataParallel, fully_shard and tensor "
                f"parallelism; {name!r} is sharded in two ways"
            )
    changed: dict[str, Tensor] = {}
    with _plain(model):
        yield model
        changed.update((name, p.detach()) for name, p in model.named_parameters())
    _write(sharded, changed)
    for module in gathered:
        module.unshard()


def gathered_bytes(model: nn.Module) -> int:
    """Return the bytes of memory that `whole_weights` uses in each process."""
    sharded = [p for p in model.parameters() if _is_sharded(p)]
    return sum(p.numel() * p.element_size() for p in sharded)


def _resharded(model: nn.Module) -> list[Any]:
    """Shard the weights that FSDP has gathered; returns the modules whose weights these are.

    After a forward pass the weights of the outermost module are gathered, by default, until the
    backward pass. What is written to gathered weights is lost when they are sharded.
    """
    found = []
    for module in _fully_sharded(model):
        before = list(module.parameters())
        module.reshard()
        after = list(module.parameters())
        if any(a is not b for a, b in zip(before, after, strict=True)):
            found.append(module)
    return found


@contextlib.contextmanager
def _plain(model: nn.Module) -> Iterator[None]:
    """Replace sharded weights by whole ones, and remove the hooks of PyTorch that act on shards."""
    weights = [
        (module, name, p)
        for module in model.modules()
        for name, p in module._parameters.items()
        if p is not None and _is_sharded(p)
    ]
    tables = [table for module in model.modules() for table in _tables(module)]
    before = [dict(table) for table in tables]
    ours = [{key for key, hook in table.items() if _acts_on_shards(hook)} for table in tables]
    made = {id(p): nn.Parameter(_whole(p), requires_grad=p.requires_grad) for _, _, p in weights}
    try:
        for table, keys in zip(tables, ours, strict=True):
            for key in keys:
                del table[key]
        for module, name, p in weights:
            module._parameters[name] = made[id(p)]
        yield
    finally:
        with uninterrupted():
            for module, name, p in weights:
                module._parameters[name] = p
            for table, entries, keys in zip(tables, before, ours, strict=True):
                here = {**entries, **table}  # in the order of before, as hooks run in it
                kept = {key: hook for key, hook in here.items() if key in keys or key in table}
                table.clear()
                table.update(kept)


def _tables(module: nn.Module) -> list[dict[Any, Any]]:
    """Return what holds functions that run ahead of or after the forward pass of a module."""
    return [module._forward_pre_hooks, module._forward_hooks]


def _acts_on_shards(hook: Any) -> bool:
    parts = ("torch.distributed.tensor", "torch.distributed.fsdp")
    return str(getattr(hook, "__module__", "")).startswith(parts)


def _write(sharded: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
    """Copy whole weights, which all ranks have, into their shards."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    with torch.no_grad():
        for name, p in sharded.items():
            assert isinstance(p.data, DTensor)
            p.copy_(distribute_tensor(values[name], p.data.device_mesh, p.data.placements))


def _whole(parameter: Tensor) -> Tensor:
    """Return a whole copy of a sharded parameter."""
    from torch.distributed.tensor import DTensor

    data: Any = parameter.data
    assert isinstance(data, DTensor)
    device = data.device_mesh.device_type  # shards may be offloaded to main memory
    on_device: Any = data.to(device)
    whole: Tensor = on_device.full_tensor().clone()
    return whole


def _shards(parameter: Tensor) -> int:
    """Return the number of axes of the device mesh that a parameter is sharded along."""
    from torch.distributed.tensor import DTensor

    assert isinstance(parameter.data, DTensor)
    return sum(not placement.is_replicate() for placement in parameter.data.placements)


def _is_sharded(parameter: Tensor) -> bool:
    from torch.distributed.tensor import DTensor

    return isinstance(parameter.data, DTensor)


def _fully_sharded(model: nn.Module) -> list[Any]:
    """Return the modules that `fully_shard` was called on."""
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]
