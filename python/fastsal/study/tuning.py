"""Fine-tune on a source: batches of all its tasks, each with its own head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastsal.data.image_set import ImageBatches
from fastsal.finetuning.finetune import FinetuneResult, finetune
from fastsal.pruning.masks.masks import Masks
from fastsal.study.images import few
from fastsal.study.settings.schema import FinetuneSettings
from fastsal.study.sources import PruningSource
from fastsal.transfer.headed import Headed, SegmentedCrossEntropy


@dataclass(frozen=True)
class TuningImages:
    """Batches of several tasks; labels are offset to the concatenated logits.

    Attributes:
        parts: Batches of each task.
        shifts: Offset of the labels of each task.
        batch_size: Images per batch; a batch has images of one task.
        shuffled: Whether each pass has a new order, drawn with the global generator of torch.
    """

    parts: Sequence[ImageBatches]
    shifts: Sequence[int]
    batch_size: int
    shuffled: bool = True

    @property
    def samples(self) -> int:
        """Total number of images."""
        return sum(part.samples for part in self.parts)

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        pieces: list[tuple[int, npt.NDArray[np.int64]]] = []
        for i, part in enumerate(self.parts):
            order = part.order
            if self.shuffled:
                order = order[torch.randperm(len(order)).numpy()]
            cuts = range(self.batch_size, len(order), self.batch_size)
            pieces += [(i, piece) for piece in np.split(order, cuts)]
        turns = torch.randperm(len(pieces)).tolist() if self.shuffled else range(len(pieces))
        for turn in turns:
            i, piece = pieces[turn]
            for images, labels in replace(self.parts[i], order=piece):
                yield images, labels + self.shifts[i]


def tune(source: PruningSource, masks: Masks, settings: FinetuneSettings) -> FinetuneResult:
    """Fine-tune the pruned backbone of a source on its tasks; heads and normalization are frozen.

    For an unlabeled source, the labels are the predictions of the dense model.

    Args:
        source: Source with the pruned backbone.
        masks: Masks, with parameter names of `Headed`.
        settings: Settings of fine-tuning.
    """
    backbone = source.backbone
    heads = [backbone.differentiable[part.task] for part in source.images]
    model = Headed(backbone.model, heads)
    sizes = [len(part.tune.classes) for part in source.images]
    shifts = [int(n) for n in np.cumsum([0, *sizes[:-1]])]
    size = source.study.batch_size
    rng = np.random.default_rng(source.seed)
    kept: list[ImageBatches] = []
    held: list[ImageBatches] = []
    for part, labels in zip(source.images, source.targets, strict=True):
        images = replace(part.tune, y=labels)
        if settings.images is not None:
            chosen = few(part.tune, settings.images // len(source.images))
            images = images.subset(np.flatnonzero(np.isin(images.index, chosen.index)))
        order = rng.permutation(len(images))
        cut = round(settings.held_out * len(images))
        held.append(ImageBatches(images, backbone.spec, order[:cut], size))
        kept.append(ImageBatches(images, backbone.spec, order[cut:], size))
    return finetune(
        model,
        TuningImages(kept, shifts, size),
        masks,
        epochs=settings.epochs,
        lr=settings.lr,
        optimizer=settings.optimizer,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        schedule=settings.schedule,
        held_out=TuningImages(held, shifts, size, shuffled=False) if settings.held_out else None,
        patience=settings.patience,
        autocast=source.autocast,
        loss="cross-entropy" if len(sizes) == 1 else SegmentedCrossEntropy(sizes),
        seed=source.seed,
    )
