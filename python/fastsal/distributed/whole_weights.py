"""Models that are wrapped or sharded, with whole weights while statistics are made of them.

Weights are four bytes each, their sums 130 and more: what has to be shared out is the sums. So a
model of FSDP2 or of tensor parallelism is gathered for the time of the passes, and sharded again
with what came out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastsal.errors import UnsupportedLayer


@contextlib.contextmanager
def whole_weights(model: nn.Module) -> Iterator[nn.Module]:
    """Give the plain model inside a wrapper, all of its weights on every rank.

    Inside the block weights may be changed in place; sharded ones have the changes after it.

    Raises:
        UnsupportedLayer: Its weights are sharded in a way that cannot be undone here.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
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
                f"model: {left[0]!r} is sharded in two ways at once; takes plain models, "
                "DistributedDataParallel, fully_shard, or tensor parallelism"
            )
        yield model
        changed.update((name, p.detach()) for name, p in model.named_parameters())
    _write(sharded, changed)


def gathered_bytes(model: nn.Module) -> int:
    """Memory that `whole_weights` takes of each process."""
    sharded = {n: p for n, p in model.named_parameters() if _is_sharded(p)}
    # FSDP keeps what it gathered beside the copies that are worked with.
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
    # FSDP frees the memory that it gathered weights in, which nothing else may hold then.
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
    """Put whole weights in the place of those of `parallelize_module`, and its hooks aside."""
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
    """Give every rank its shard of whole weights, which all ranks have."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    with torch.no_grad():
        for name, p in sharded.items():
            assert isinstance(p.data, DTensor)
            p.copy_(distribute_tensor(values[name], p.data.device_mesh, p.data.placements))


def _whole(parameter: Tensor) -> Tensor:
    """All of a sharded parameter, on every rank."""
    from torch.distributed.tensor import DTensor

    assert isinstance(parameter.data, DTensor)
    return parameter.data.full_tensor().clone()


def _is_sharded(parameter: Tensor) -> bool:
    from torch.distributed.tensor import DTensor

    return isinstance(parameter.data, DTensor)


def _fully_sharded(model: nn.Module) -> list[Any]:
    """The modules that `fully_shard` was called on."""
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]
