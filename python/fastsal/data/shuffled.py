"""Batches of an image set in an order that changes from pass to pass."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastsal.data.image_set import Batches


@dataclass(frozen=True)
class Shuffled:
    """The same images in a new order each pass, drawn from torch's global random numbers.

    `finetune` seeds those for every epoch, so that a run can be repeated, and gone on with.
    """

    batches: Batches

    @property
    def samples(self) -> int:
        """Images in all."""
        return self.batches.samples

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(self.samples).numpy()
        yield from replace(self.batches, order=self.batches.order[order])
