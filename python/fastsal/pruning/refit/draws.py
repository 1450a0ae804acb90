"""Draw augmented batches of images for refitting.

Axes: n images, c channels, h and w pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsal.data.batches import Pair

# `(images [n, c, h, w], generator)` to images of the same shape.
Augmentation = Callable[[Tensor, torch.Generator], Tensor]

# Images are shifted by at most this fraction of their side: 4 pixels of 32, as is usual on CIFAR.
_SHIFT = 1 / 8


def flip_and_shift(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror half of the images and shift each by up to an eighth of its side.

    The pixels that a shift leaves free repeat the edge. Token ids and anything else that is not
    `[n, c, h, w]` is returned as it is.
    """
    if images.ndim != 4 or not images.is_floating_point():
        return images
    n, _, h, w = images.shape
    draws = torch.rand(n, generator=generator, dtype=torch.float32, device="cpu")
    mirrored = draws < 0.5
    images = torch.where(mirrored[:, None, None, None].to(images.device), images.flip(3), images)
    up, left = max(1, int(h * _SHIFT)), max(1, int(w * _SHIFT))
    padded = F.pad(images, (left, left, up, up), mode="replicate")
    tops = torch.randint(2 * up + 1, (n,), generator=generator, device="cpu").tolist()
    lefts = torch.randint(2 * left + 1, (n,), generator=generator, device="cpu").tolist()
    return torch.stack(
        [
            image[:, top : top + h, start : start + w]
            for image, top, start in zip(padded, tops, lefts, strict=True)
        ]
    )


class Draws:
    """Endless batches of images in random order, through a buffer of bounded size.

    The source is iterated again and again. Each drawn image is replaced in the buffer by the next
    one of the source, so that images are mixed even where the source is sorted. A source that fits
    into the buffer is read once, and drawn in permutations.

    Args:
        source: Pairs `(images, anything)`; iterable again, unless it fits into the buffer.
        size: Images of a batch; fewer if the source has fewer.
        generator: Random numbers.
        room: Bytes of the buffer.
    """

    def __init__(
        self, source: Iterable[Pair], size: int, generator: torch.Generator, room: int = 2**28
    ) -> None:
        self._source, self._size, self._generator = source, size, generator
        self._room = room

    def __iter__(self) -> Iterator[Tensor]:
        """Yield batches `[size, ...]` without end."""
        rows = self._rows()
        buffer: list[Tensor] = []
        taken = 0
        for row in rows:
            buffer.append(row)
            taken += row.numel() * row.element_size()
            if taken >= self._room and len(buffer) >= self._size:
                break
        else:
            yield from self._permutations(buffer)
        while True:
            chosen = self._order(len(buffer))[: self._size]
            yield torch.stack([buffer[i] for i in chosen])
            for i in chosen:
                following = next(rows, None)
                if following is None:
                    rows = self._rows()
                    following = next(rows)
                buffer[i] = following

    def _permutations(self, buffer: list[Tensor]) -> Iterator[Tensor]:
        order: list[int] = []
        size = min(self._size, len(buffer))
        while True:
            if len(order) < size:
                order += self._order(len(buffer))
            chosen, order = order[:size], order[size:]
            yield torch.stack([buffer[i] for i in chosen])

    def _order(self, n: int) -> list[int]:
        order: list[int] = torch.randperm(n, generator=self._generator, device="cpu").tolist()
        return order

    def _rows(self) -> Iterator[Tensor]:
        for images, _ in self._source:
            # A view would keep the whole batch in memory.
            yield from (image.clone() for image in images)
