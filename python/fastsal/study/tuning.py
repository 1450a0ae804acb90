"""Fine-tune on a source: batches of all its tasks, each with its own head."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastsal.data.image_set import ImageBatches, ImageSet
from fastsal.errors import InvalidArgument
from fastsal.finetuning.finetune import FinetuneResult, finetune
from fastsal.pruning.masks.masks import Masks
from fastsal.study.images import few, images_of
from fastsal.study.settings.schema import FinetuneSettings, Study
from fastsal.study.sources import PruningSource
from fastsal.transfer.headed import Headed, SegmentedCrossEntropy
from fastsal.transfer.tasks import Task


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
                order = order[torch.randperm(len(order), device="cpu").numpy()]
            cuts = range(self.batch_size, len(order), self.batch_size)
            pieces += [(i, piece) for piece in np.split(order, cuts)]
        turns = (
            torch.randperm(len(pieces), device="cpu").tolist()
            if self.shuffled
            else range(len(pieces))
        )
        for turn in turns:
            i, piece = pieces[turn]
            for images, labels in replace(self.parts[i], order=piece):
                yield images, labels + self.shifts[i]


def check_tuning(study: Study, tasks: Mapping[str, Task]) -> None:
    """Raise an error if the images of a task are too few for fine-tuning as a study says."""
    if study.finetune is None:
        return
    for source in study.sources:
        counts = {
            name: len(_chosen(images_of(tasks[name].tune), study.finetune, len(source.tasks)))
            for name in source.tasks
        }
        _check_held_out(study.finetune, counts)


def _chosen(images: ImageSet, settings: FinetuneSettings, tasks: int) -> ImageSet:
    """Return the images of one of several tasks to fine-tune on, before some are held out."""
    if settings.images is None:
        return images
    share = "" if tasks == 1 else f" divided by {tasks} tasks"
    return few(images, settings.images // tasks, f"finetune.images{share}")


def _check_held_out(settings: FinetuneSettings, counts: Mapping[str, int]) -> None:
    """Check that each task has images to train on, and any task images that are held out."""
    held = {name: round(settings.held_out * count) for name, count in counts.items()}
    for name, count in counts.items():
        if held[name] == count or (settings.held_out and not any(held.values())):
            raise InvalidArgument(
                f"finetune.held_out must leave images to train on and to hold out, got "
                f"{settings.held_out:g}: {held[name]} of the {count} images of task {name!r} would "
                "be held out"
            )


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
            chosen = _chosen(part.tune, settings, len(source.images))
            images = images.subset(np.flatnonzero(np.isin(images.index, chosen.index)))
        order = rng.permutation(len(images))
        cut = round(settings.held_out * len(images))
        held.append(ImageBatches(images, backbone.spec, order[:cut], size))
        kept.append(ImageBatches(images, backbone.spec, order[cut:], size))
    names = [part.task for part in source.images]
    parts = zip(names, held, kept, strict=True)
    _check_held_out(settings, {name: h.samples + k.samples for name, h, k in parts})
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
