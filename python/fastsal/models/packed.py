"""Packed files: a lossless layout of weights with many zeros, in safetensors.

A tensor NAME of a packed file is stored as `mask:NAME`, uint8, the bits of its non-zero elements in
row-major order, eight to a byte, the first in the highest bit, compressed by deflate (zlib); and
`values:NAME`, these elements. Tensors that would not be smaller are stored as they are. The
metadata `fastsal.packed` is JSON: `{"version": 1, "tensors": {NAME: shape}}`.

An element is zero if all its bits are; -0.0 is a value.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsal.errors import FileFormatError, InvalidArgument

METADATA = "fastsal.packed"
_VERSION = 1
_MASK, _VALUES = "mask:", "values:"
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def pack(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a packed file.

    Args:
        state: Name to tensor, none of which shares memory with another.

    Raises:
        InvalidArgument: A name begins with `mask:` or `values:`.
    """
    tensors: dict[str, Tensor] = {}
    shapes: dict[str, list[int]] = {}
    for name, tensor in state.items():
        if name.startswith((_MASK, _VALUES)):
            raise InvalidArgument(
                f"model: names must not begin with {_MASK!r} or {_VALUES!r} in a packed file, got "
                f"{name!r}"
            )
        plain = tensor.detach().cpu().contiguous()
        small = None if plain.is_complex() else _packed(plain)
        if small is None:
            tensors[name] = plain
            continue
        shapes[name] = list(plain.shape)
        tensors[_MASK + name], tensors[_VALUES + name] = small
    return tensors, {METADATA: json.dumps({"version": _VERSION, "tensors": shapes})}


def _packed(tensor: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return the mask and the values of a tensor; None if they are not smaller."""
    flat = tensor.reshape(-1)
    if not len(flat):
        return None
    kept = flat.view(_BITS[flat.element_size()]) != 0
    count = int(kept.sum())
    if count == len(flat):
        return None
    bits = zlib.compress(np.packbits(kept.numpy()).tobytes(), 6)
    if len(bits) + count * flat.element_size() >= flat.nbytes:
        return None
    # By their bits: some types, such as uint16, cannot be indexed.
    values = flat.view(_BITS[flat.element_size()])[kept].view(tensor.dtype)
    return torch.frombuffer(bytearray(bits), dtype=torch.uint8), values


def is_packed(metadata: Mapping[str, str] | None) -> bool:
    """Whether metadata is that of a packed file."""
    return METADATA in (metadata or {})


def unpack(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], path: str | os.PathLike[str]
) -> dict[str, Tensor]:
    """Return the state dict of a packed file, with every bit as it was packed.

    Args:
        tensors: All tensors of the file.
        metadata: Its metadata.
        path: The file, for messages.

    Raises:
        FileFormatError: The file is damaged.
    """
    try:
        header: Any = json.loads(metadata[METADATA])
        if header["version"] != _VERSION:
            raise FileFormatError(
                f"weights: {path} is a packed file of version {header['version']}, this version of "
                f"fastsal reads {_VERSION}"
            )
        shapes = {str(name): [int(n) for n in shape] for name, shape in header["tensors"].items()}
        inner = {key for name in shapes for key in (_MASK + name, _VALUES + name)}
        state = {name: value for name, value in tensors.items() if name not in inner}
        for name, shape in shapes.items():
            state[name] = _unpacked(tensors[_MASK + name], tensors[_VALUES + name], shape)
    except (KeyError, TypeError, ValueError, AttributeError, zlib.error) as error:
        raise FileFormatError(
            f"weights: {path} is a damaged packed file ({type(error).__name__}: {error})"
        ) from None
    return state


def _unpacked(mask: Tensor, values: Tensor, shape: list[int]) -> Tensor:
    count = math.prod(shape)
    if min(shape, default=1) < 0:
        raise ValueError("a shape is negative")
    limit = (count + 7) // 8
    found = zlib.decompressobj()
    bits = found.decompress(mask.numpy().tobytes(), limit + 1)
    if len(bits) != limit:
        raise ValueError("a mask has another length than its tensor")
    kept = torch.from_numpy(np.unpackbits(np.frombuffer(bits, np.uint8), count=count).view(bool))
    if int(kept.sum()) != len(values):
        raise ValueError("a mask has another number of elements than its values")
    kind = _BITS[values.element_size()]
    whole = torch.zeros(count, dtype=kind, device="cpu")
    whole[kept] = values.view(kind)
    return whole.view(values.dtype).view(shape)
