"""A cheap digest of a stream of images, by which a later pass over other images is noticed."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

# Elements of an image that are hashed, spread over it: hashing all of them would take as long as
# reading them. Shuffling, cropping, flipping and noise change almost every one of them.
_ELEMENTS = 256


class StreamDigest:
    """Digest of images and labels in their order, whatever the batches that they arrive in.

    Attributes:
        samples: Number of images so far.
    """

    def __init__(self) -> None:
        self.samples = 0
        self._images = hashlib.blake2b(digest_size=16)
        self._labels = hashlib.blake2b(digest_size=16)

    def add(self, images: Tensor, labels: Tensor | None) -> None:
        """Add a batch: images `[n, ...]`, and labels `[n, ...]` or None."""
        self.samples += images.shape[0]
        self._images.update(_bytes(images))
        if labels is not None:
            self._labels.update(_bytes(labels))

    def value(self) -> bytes:
        """Return the digest of everything added so far."""
        return self._images.digest() + self._labels.digest()


def sample_digests(images: Tensor) -> list[bytes]:
    """Return a digest of every image."""
    some = _some(images)
    return [hashlib.blake2b(_raw(row), digest_size=16).digest() for row in some]


def _bytes(values: Tensor) -> memoryview:
    return _raw(_some(values))


def _some(values: Tensor) -> Tensor:
    """Return elements of every sample `[n, k]`, on the CPU."""
    if values.device.type == "meta":
        return torch.zeros(values.shape[0], 1, dtype=torch.float32, device="cpu")
    flat = values.detach().reshape(values.shape[0], -1)
    # An odd stride, so that it meets all columns of images whose width is a power of two.
    stride = flat.shape[1] // _ELEMENTS | 1
    return flat[:, ::stride].cpu().contiguous()


def _raw(values: Tensor) -> memoryview:
    return values.reshape(-1).view(torch.uint8).numpy().data
