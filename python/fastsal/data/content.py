"""Digests of images and labels by their content, for checkpoints and caches.

Axes: n images.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsal.data.batches import Batches, Pair, Source
from fastsal.data.image_set import ImageSet
from fastsal.data.places import place_digest
from fastsal.data.unpacking import LabelUse
from fastsal.errors import FileFormatError
from fastsal.utils.digests import Digest
from fastsal.utils.identity import identity_of
from fastsal.utils.warn import warn_user

_MODULUS = 1 << 256
_PASSES = 2  # that are compared with each other to see whether images change


def content_of(images: ImageSet) -> str:
    """Return the SHA-256, in hex, of the pixels, labels and class names of an image set.

    Files count by their content. With a transform, its code and the `index` of the images count
    too, as it may depend on that.
    """
    digest = Digest().json(list(images.classes)).array(images.y)
    if isinstance(images.x, tuple):
        for file in images.x:
            digest.text(place_digest(file))
    else:
        digest.text(f"{images.x.dtype} {images.x.shape}").array(images.x)
    if images.transform is not None:
        digest.text(identity_of(images.transform)).array(images.index)
    return digest.hexdigest()


class SeenImages:
    """Records what passes over images saw, and compares it with what an earlier run saw.

    The digest of a pass is a sum over its samples, so that neither their order nor the size of
    batches matters. The first two complete passes are read; if they differ, the images change from
    pass to pass, as augmented ones do, and only their number can be compared.

    Args:
        name: Name of the argument that gave the images, for messages.
    """

    def __init__(self, name: str = "batches") -> None:
        self._name = name
        self._passes: list[tuple[int, str]] = []
        self._changes = False

    def watch(self, pairs: Iterable[Pair]) -> Iterator[Pair]:
        """Yield the pairs of one pass, and record what it saw if it is complete."""
        if self._changes or len(self._passes) == _PASSES:
            yield from pairs
            return
        count, total = 0, 0
        for images, labels in pairs:
            total += _sum_of(images, labels)
            count += len(images)
            yield images, labels
        self._passes.append((count, f"{total % _MODULUS:064x}"))
        self._changes = len(set(self._passes)) > 1

    def recorded(self) -> dict[str, Any]:
        """Return what was seen so far, as JSON values for a checkpoint."""
        count, digest = self._passes[0] if self._passes else (0, "")
        is_checked = len(self._passes) == _PASSES or self._changes
        return {
            "samples": count,
            "digest": None if self._changes else digest,
            "passes": _PASSES if is_checked else len(self._passes),
        }

    def check(self, found: Mapping[str, Any] | None, passes: Callable[[], Iterable[Pair]]) -> None:
        """Compare with what a checkpoint recorded, in a pass over the images.

        A second pass is made where they differ, to see whether the images of this run change from
        pass to pass.

        Args:
            found: What `recorded` returned in the earlier run; None for nothing.
            passes: Starts a new pass, which is not watched yet.

        Raises:
            FileFormatError: The images or labels are others.
        """
        if not found or not found["passes"]:
            return
        if found["digest"] is None:
            self._changes = True  # they did in the earlier run
            return
        for _ in self.watch(passes()):
            pass
        mine = self._passes[-1]
        if mine == (found["samples"], found["digest"]):
            return
        if mine[0] == found["samples"] and found["passes"] < _PASSES:
            for _ in self.watch(passes()):
                pass
            if self._changes:
                warn_user(
                    f"{self._name} yield other images on every pass, so that it is not known "
                    "whether the checkpoint is of the same ones"
                )
                return
        raise FileFormatError(
            f"checkpoint: it belongs to a run with other {self._name} ({found['samples']} samples "
            f"there, {mine[0]} here, or other images or labels); pass the same images and labels, "
            "or another path"
        )


class RecordedSource(Source):
    """Validated batches, of which `SeenImages` records what complete passes see.

    Args:
        batches: Iterable of `(images, labels)`.
        samples: Number of samples after which iteration stops; None for all.
        labels: Whether labels are required, optional or ignored.
        record: What was seen.
    """

    def __init__(
        self, batches: Batches, samples: int | None, labels: LabelUse, record: SeenImages
    ) -> None:
        super().__init__(batches, samples, labels)
        self._record = record

    def __call__(self) -> Iterator[Pair]:
        """Iterate over all batches."""
        return self._record.watch(super().__call__())


def _sum_of(images: Tensor, labels: Tensor | None) -> int:
    """Return the sum of the digests of the samples of a batch."""
    head = f"{images.dtype} {tuple(images.shape[1:])}"
    rows = _bytes(images)
    tags: Any = [b""] * len(images)
    if labels is not None:
        head += f" {labels.dtype} {tuple(labels.shape[1:])}"
        tags = _bytes(labels)
    start = hashlib.sha256(head.encode())
    total = 0
    for row, tag in zip(rows, tags, strict=True):
        sha = start.copy()
        sha.update(row)
        sha.update(tag)
        total += int.from_bytes(sha.digest(), "big")
    return total


def _bytes(tensor: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return the elements of each sample as bytes, uint8 `[n, bytes]`."""
    values = tensor.detach().cpu().contiguous()
    return values.reshape(len(values), -1).view(torch.uint8).numpy()
