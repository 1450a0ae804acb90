"""Models that are wrapped or sharded, with whole weights while statistics are made of them.

Weights are four bytes each, their sums 130 and more: what has to be shared out is the sums. So a
model of FSDP2 is gathered for the time of the passes, and sharded again with what came out.
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
    modules = _fully_sharded(model)
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.set_reshard_after_backward(False, recurse=False)
        module.unshard()
    # FSDP frees the memory that it gathered weights in, which nothing else may hold then.
    gathered = {name: p.data for name, p in model.named_parameters()}
    left = [name for name, p in model.named_parameters() if _is_sharded(p)]
    try:
        if left:
            raise UnsupportedLayer(
                f"model: {left[0]!r} is sharded by something else than fully_shard (tensor "
                "parallelism); takes plain models, DistributedDataParallel and fully_shard"
            )
        for p in model.parameters():
            p.data = p.data.clone()
        yield model
        changed = {name: p.data for name, p in model.named_parameters()}
    finally:
        for name, p in model.named_parameters():
            p.data = gathered[name]
        gathered.clear()
        for module in modules:
            module.reshard()
            module.set_reshard_after_forward(True, recurse=False)
            module.set_reshard_after_backward(True, recurse=False)
    _write(sharded, changed)


def _write(sharded: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
    """Give every rank its shard of whole weights, which all ranks have."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    with torch.no_grad():
        for name, p in sharded.items():
            assert isinstance(p.data, DTensor)
            p.copy_(distribute_tensor(values[name], p.data.device_mesh, p.data.placements))


def _is_sharded(parameter: Tensor) -> bool:
    from torch.distributed.tensor import DTensor

    return isinstance(parameter.data, DTensor)


def _fully_sharded(model: nn.Module) -> list[Any]:
    """The modules that `fully_shard` was called on."""
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]
