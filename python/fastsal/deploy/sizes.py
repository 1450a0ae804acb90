"""Sizes of a model: parameters, zeros, multiply-accumulates, and files."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastsal.gradients.weight_macs import weight_macs
from fastsal.models.packed import pack
from fastsal.models.saving import tensors_in


@dataclass(frozen=True)
class ModelSize:
    """The size of a model.

    Attributes:
        parameters: Number of parameters.
        nonzeros: Those that are not zero; None for a model without its values.
        macs: Multiply-accumulates of linear layers and convolutions for one image.
        nonzero_macs: Those with a weight that is not zero; no dense library skips the others. None
            for a model without its values.
        dense_bytes: All tensors in their own types.
        zipped_bytes: The same, compressed by deflate; None for a model without its values.
        packed_bytes: The tensors of a packed file; None for a model without its values.
    """

    parameters: int
    nonzeros: int | None
    macs: int
    nonzero_macs: int | None
    dense_bytes: int
    zipped_bytes: int | None
    packed_bytes: int | None


def model_size(model: nn.Module, images: Tensor, *, has_values: bool) -> ModelSize:
    """Return the size of a model.

    Args:
        model: The model, in any mode.
        images: `[n, ...]`; two run through the model.
        has_values: Whether the model has its values, and not random ones.
    """
    parameters = list(model.parameters())
    macs = weight_macs(model, images)
    owned = dict(model.named_parameters())
    state: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors_in(model.state_dict()).items():
        if tensor.data_ptr() not in seen or not tensor.numel():
            state[name] = tensor
        seen.add(tensor.data_ptr())
    nonzero_macs = None
    if has_values:
        nonzero_macs = sum(
            each * int(owned[name].count_nonzero()) for name, each in macs.items() if each
        )
    return ModelSize(
        sum(p.numel() for p in parameters),
        sum(int(p.count_nonzero()) for p in parameters) if has_values else None,
        sum(each * owned[name].numel() for name, each in macs.items()),
        nonzero_macs,
        sum(t.nbytes for t in state.values()),
        _zipped(state) if has_values else None,
        sum(t.nbytes for t in pack(state)[0].values()) if has_values else None,
    )


def _zipped(state: dict[str, Tensor]) -> int:
    zipped, size = zlib.compressobj(6), 0
    for tensor in state.values():
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        size += len(zipped.compress(flat.numpy().data))
    return size + len(zipped.flush())
