"""Batches of an image set, reshuffled for every pass."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastsal.data.image_set import ImageBatches


@dataclass(frozen=True)
class Shuffled:
    """Batches reshuffled for every pass with the global random numbers of PyTorch.

    `finetune` seeds these for every epoch, so that runs are reproducible and can be resumed.
    """

    batches: ImageBatches

    @property
    def samples(self) -> int:
        """Number of images of a pass."""
        return self.batches.samples

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(self.samples, device="cpu").numpy()
        yield from replace(self.batches, order=self.batches.order[order])
