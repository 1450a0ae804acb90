"""A store for copies of weights and scores, in memory or in a scratch file."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from fastsal.utils.interrupts import uninterrupted
from fastsal.utils.mapped_files import FileArrays, aligned


class Shelf:
    """A store for copies of tensors: in memory, or in files of a scratch folder.

    Each purpose has its own file; new tensors for a purpose replace the previous ones.

    Args:
        folder: The scratch folder; None for memory.

    Attributes:
        depth: Number of `all_or_nothing` blocks that are active, one inside the other.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        self._folder = folder
        self.depth = 0
        self._files: dict[str, tuple[FileArrays, dict[str, Tensor]]] = {}

    def room(
        self, purpose: str, shapes: Mapping[str, Sequence[int]], dtype: torch.dtype = torch.float32
    ) -> dict[str, Tensor]:
        """Return uninitialized tensors on the CPU, to be filled by the caller."""
        if self._folder is None:
            return {
                name: torch.empty(tuple(shape), dtype=dtype, device="cpu")
                for name, shape in shapes.items()
            }
        key = f"{purpose} {dtype} {[tuple(s) for s in shapes.values()]}"
        if key not in self._files:
            sizes = {name: math.prod(shape) * dtype.itemsize for name, shape in shapes.items()}
            file = FileArrays(self._folder, sum(map(aligned, sizes.values())))
            places = {
                n: torch.from_numpy(file.take((size,), np.uint8)) for n, size in sizes.items()
            }
            self._files[key] = file, {n: p.view(dtype).view(shapes[n]) for n, p in places.items()}
        return dict(self._files[key][1])

    def put(self, purpose: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return copies of tensors: in main memory, or in a file.

        The memory of a GPU is for passes and sums; copies there would halve it.
        """
        if self._folder is None:
            return {name: _copy(p.detach()) for name, p in tensors.items()}
        kept = {}
        for dtype in {p.dtype for p in tensors.values()}:
            some = {name: p for name, p in tensors.items() if p.dtype == dtype}
            places = self.room(purpose, {n: p.shape for n, p in some.items()}, dtype)
            for name, place in places.items():
                kept[name] = place.copy_(some[name].detach())
                self.release()
        return {name: kept[name] for name in tensors}

    def release(self) -> None:
        """Release the memory of tensors that are stored in files."""
        for file, _ in self._files.values():
            file.release()


def _copy(tensor: Tensor) -> Tensor:
    # Those of subclasses, such as shards of a mesh of devices, remain where they are.
    is_plain = type(tensor) is Tensor and tensor.device.type not in ("cpu", "meta")
    return tensor.cpu() if is_plain else tensor.clone()


@contextlib.contextmanager
def all_or_nothing(
    tensors: Mapping[str, Tensor], shelf: Shelf | None = None
) -> Iterator[dict[str, Tensor]]:
    """Restore parameters and buffers if the block raises; yields copies of their values.

    Blocks may be nested: each has its own copies.
    """
    shelf = shelf or Shelf()
    original = shelf.put(f"original {shelf.depth}", tensors)
    shelf.depth += 1
    try:
        yield original
    except BaseException:
        restore(tensors, original)
        raise
    finally:
        shelf.depth -= 1


def copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies of tensors, in memory."""
    return Shelf().put("copies", tensors)


def restore(
    tensors: Mapping[str, Tensor], values: Mapping[str, Tensor], shelf: Shelf | None = None
) -> None:
    """Copy values back into tensors of the same names, one at a time from a shelf."""
    # Half of the values would be another model; a second Ctrl-C often comes while they return.
    with torch.no_grad(), uninterrupted():
        for name, value in values.items():
            tensors[name].copy_(value)
            if shelf is not None:
                shelf.release()


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of the parameters and buffers of a model that a fit may change."""
    return sum(tensor.nbytes for tensor in tensors_of(model).values())


def tensors_of(model: nn.Module) -> Mapping[str, Tensor]:
    """Return the parameters and buffers of a model that a fit may change."""
    found = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor for name, tensor in found.items() if tensor.is_floating_point()}
