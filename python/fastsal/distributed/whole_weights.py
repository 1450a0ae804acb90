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


@contextlib.contextmanager
def whole_weights(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the model inside a wrapper, with all weights on every rank.

    Weights may be changed in place inside the block. Sharded weights get the changes after it.

    Raises:
        UnsupportedLayer: Weights are sharded in an unsupported way.
    """
    model = unwrapped(model)
    sharded = {n: p for n, p in model.named_parameters() if _is_sharded(p)}
    if not sharded:
        yield model
        return
    gather = _fully_sharded_as_whole if _fully_sharded(model) else _tensor_parallel_as_whole
    changed: dict[str, Tensor] = {}
    with gather(model):
        left = [name for name, p in model.named_parameters() if _is_sharded(p)]
        if left:
            raise UnsupportedLayer(
                "model must use at most one of DistributedDataParallel, fully_shard and tensor "
                f"parallelism; {left[0]!r} is sharded in two ways"
            )
        yield model
        changed.update((name, p.detach()) for name, p in model.named_parameters())
    _write(sharded, changed)


def gathered_bytes(model: nn.Module) -> int:
    """Return the bytes of memory that `whole_weights` uses in each process."""
    sharded = {n: p for n, p in model.named_parameters() if _is_sharded(p)}
    # FSDP keeps the gathered weights in addition to the copies.
    copies = 2 if _fully_sharded(model) else 1
    return copies * sum(p.numel() * p.element_size() for p in sharded.values())


@contextlib.contextmanager
def _fully_sharded_as_whole(model: nn.Module) -> Iterator[None]:
    """Gather what `fully_shard` shards."""
    modules = _fully_sharded(model)
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.set_reshard_after_backward(False, recurse=False)
        module.unshard()
    # FSDP frees the memory of gathered weights, so the model must use copies.
    gathered = {name: p.data for name, p in model.named_parameters()}
    for p in model.parameters():
        p.data = p.data.clone()
    try:
        yield
    finally:
        for name, p in model.named_parameters():
            p.data = gathered[name]
        gathered.clear()
        for module in modules:
            module.reshard()
            module.set_reshard_after_forward(True, recurse=False)
            module.set_reshard_after_backward(True, recurse=False)


@contextlib.contextmanager
def _tensor_parallel_as_whole(model: nn.Module) -> Iterator[None]:
    """Replace the weights of `parallelize_module` by whole ones, and remove its hooks."""
    weights: list[tuple[nn.Module, str, nn.Parameter]] = []
    hooks: list[tuple[dict[int, Any], int, Any]] = []
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None and _is_sharded(p):
                weights.append((module, name, p))
        for table in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in table.items():
                if getattr(hook, "__module__", "").startswith("torch.distributed.tensor"):
                    hooks.append((table, key, hook))
    made = {id(p): nn.Parameter(_whole(p), requires_grad=False) for _, _, p in weights}
    for table, key, _ in hooks:
        del table[key]
    try:
        for module, name, p in weights:
            made[id(p)].requires_grad_(p.requires_grad)
            module._parameters[name] = made[id(p)]
        yield
    finally:
        for module, name, p in weights:
            module._parameters[name] = p
        for table, key, hook in hooks:
            table[key] = hook


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

    assert isinstance(parameter.data, DTensor)
    return parameter.data.full_tensor().clone()


def _is_sharded(parameter: Tensor) -> bool:
    from torch.distributed.tensor import DTensor

    return isinstance(parameter.data, DTensor)


def _fully_sharded(model: nn.Module) -> list[Any]:
    """Return the modules that `fully_shard` was called on."""
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]
