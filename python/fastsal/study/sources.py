"""Collect the statistics of a source, shared by all criteria, sparsities and dampings."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from fastsal.data.batches import Batches
from fastsal.data.held_out import Repeated
from fastsal.data.image_set import ImageSet
from fastsal.fisher.block_fisher import BlockFisher
from fastsal.fisher.statistics import Collected, Statistics
from fastsal.gradients import select_parameters
from fastsal.gradients.losses import cross_entropy
from fastsal.models.evaluating import evaluating
from fastsal.models.inputs import InputSpec
from fastsal.pruning.job import Job
from fastsal.pruning.measured import Measured
from fastsal.pruning.recipe import Recipe
from fastsal.pruning.rounds import RoundStatistics, find_statistics
from fastsal.study.backbones import Backbone
from fastsal.study.folder_format import SOURCE, TRANSFER
from fastsal.study.images import SourceImages
from fastsal.study.settings.schema import CriterionSettings, SourceSettings, Study
from fastsal.transfer.headed import PREFIX, Headed
from fastsal.utils.choices import Curvature

# A criterion that needs statistics; which one does not matter for collecting them.
_STATISTICS = CriterionSettings("statistics", "block-fisher")
# Rounds for which seeds are reserved: the seeds of held-out images start after these.
_SEEDS = 999


@dataclass
class PruningSource:
    """A backbone with one draw of the images that pruning sees.

    Attributes:
        study: Settings of the study.
        settings: Settings of the source.
        backbone: The model, dense when this is created.
        images: Images of each task of the source.
        seed: Seed of the draw.
        curvature: Kind of statistics, as for `fastsal.collect`.
        models: The backbone with the head of each task.
        targets: Labels for fine-tuning, int64 `[n]` for each task.
        seconds: Wall time of collecting the statistics of the first round.
        shared: Statistics of the first round, at the dense weights; None before they are collected.
        overlaps: Rows of the table `overlap`; None before they are computed.
    """

    study: Study
    settings: SourceSettings
    backbone: Backbone
    images: list[SourceImages]
    seed: int
    curvature: Curvature
    models: list[Headed] = field(init=False)
    targets: list[npt.NDArray[np.int64]] = field(init=False)
    seconds: float = 0.0
    shared: RoundStatistics | None = None
    overlaps: list[dict[str, Any]] | None = None

    def __post_init__(self) -> None:
        self.models = [
            Headed(self.backbone.model, [self.backbone.differentiable[images.task]])
            for images in self.images
        ]
        self.targets = [images.tune.y for images in self.images]
        if self.settings.curvature != "empirical" and self.study.finetune is not None:
            self.targets = [
                predicted(model, images.tune, self.backbone.spec, self.study.batch_size)
                for model, images in zip(self.models, self.images, strict=True)
            ]

    @property
    def parameters(self) -> list[str]:
        """Names of the weights to prune, as in `models`."""
        return [PREFIX + name for name in self.backbone.names]

    @property
    def autocast(self) -> torch.dtype | None:
        """Type of mixed-precision passes in statistics and fine-tuning."""
        name = self.study.autocast
        return None if name is None else getattr(torch, name)

    def role(self, task: str) -> str:
        """Return whether pruning sees a task: `SOURCE` or `TRANSFER`."""
        return SOURCE if task in self.settings.tasks else TRANSFER

    def find(self, number: int, *, dense: bool) -> RoundStatistics:
        """Return the statistics for one round; those at the dense weights are shared by cells.

        Args:
            number: Number of the round, from 1, which determines the seed of sampled labels.
            dense: Whether the model has its dense weights.
        """
        if dense and self.shared is not None:
            return self.shared
        start = time.perf_counter()
        found = self._find(number)
        if dense:
            self.shared, self.seconds = found, time.perf_counter() - start
        return found

    def dense_fisher(self) -> BlockFisher:
        """Return the statistics of all images at the dense weights."""
        return _stored(self.find(1, dense=True).joined())

    def job(
        self,
        how: CriterionSettings,
        seed: int,
        model: nn.Module | None = None,
        batches: Batches | None = None,
    ) -> Job:
        """Return a pruning job with the settings of this source.

        Args:
            how: Settings of the criterion.
            seed: Seed of the job.
            model: One of `models`; None uses the first.
            batches: Images of the statistics; None for a job that is given its statistics.
        """
        recipe = Recipe.of(
            how.criterion,
            compensate=how.compensate,
            damping=how.damping,
            ranking={"scope": how.scope, "pattern": how.pattern, "floor": how.floor},
            parameters=self.parameters,
            block_size=self.study.block_size,
            seed=seed,
        )
        model = self.models[0] if model is None else model
        statistics = {
            "curvature": self.curvature,
            "parameters": self.parameters,
            "block_size": self.study.block_size,
            "micro_batch": None,
            "autocast": self.autocast,
        }
        chosen = select_parameters(model, self.parameters)
        return Job(model, batches, None, recipe, chosen, statistics, cross_entropy)

    def _find(self, number: int) -> RoundStatistics:
        """Collect the statistics of all tasks for one round and sum them."""
        fisher: BlockFisher | None = None
        joined: BlockFisher | None = None
        tuned: list[tuple[float, Measured, nn.Module]] = []
        for images, model in zip(self.images, self.models, strict=True):
            job = self.job(_STATISTICS, self.seed, model, self._batches(images))
            found = find_statistics(job, _SEEDS, number, holds_out=True)
            assert found.tuned is not None
            tuned.append((images.weight, found.tuned, model))
            # Cells need the statistics with and without the held-out images; joining is in place.
            without = copy.deepcopy(_stored(found.fisher))
            whole = _stored(found.joined())
            fisher = self._add(fisher, without, images.weight)
            joined = self._add(joined, whole, images.weight)
        return RoundStatistics(
            _statistics(fisher), lambda: _statistics(joined), MixedHeldOut(tuned)
        )

    def all_images(self) -> Batches:
        """Return the images of the statistics of all tasks, iterable again."""
        return Repeated(lambda: chain.from_iterable(self._batches(each) for each in self.images))

    def _batches(self, images: SourceImages) -> Batches:
        """Return the images of the statistics; without labels if the source is unlabeled."""
        batches = images.prune.batches(
            self.backbone.spec,
            self.study.batch_size,
            samples=images.samples,
            shuffle_seed=self.seed,
        )
        if self.curvature == "empirical":
            return batches
        return Repeated(lambda: ((x, None) for x, _ in batches))

    def _add(self, sums: BlockFisher | None, more: BlockFisher, weight: float) -> BlockFisher:
        if sums is None:
            if weight != 1:
                more, single = _empty(more), more
                more.merge(single, weight)
            return more
        if self.settings.decay is not None:
            sums.decay(self.settings.decay)
        sums.merge(more, weight)
        return sums


@dataclass(frozen=True)
class MixedHeldOut:
    """Held-out images of several tasks, measured through the head of each.

    Attributes:
        parts: Weight, held-out images, and the backbone with its head, for each task.
    """

    parts: list[tuple[float, Measured, nn.Module]]

    @property
    def samples(self) -> int:
        """Number of images."""
        return sum(held_out.samples for _, held_out, _ in self.parts)

    def mean_loss(self, _model: nn.Module) -> float:
        """Return the weighted mean of the mean losses of the tasks."""
        total = sum(weight for weight, _, _ in self.parts)
        return sum(w * held_out.mean_loss(model) for w, held_out, model in self.parts) / total


def predicted(
    model: nn.Module, images: ImageSet, spec: InputSpec, batch_size: int
) -> npt.NDArray[np.int64]:
    """Return the predicted classes of images, int64 `[n]`."""
    found = []
    with evaluating(model) as device, torch.no_grad():
        for x, _ in images.batches(spec, batch_size):
            found.append(model(x.to(device)).argmax(dim=1).cpu())
    return torch.cat(found).numpy().astype(np.int64)


def _empty(like: BlockFisher) -> BlockFisher:
    return BlockFisher(like.shapes, block_size=like.block_size, precision=like.precision)


def _statistics(fisher: BlockFisher | None) -> Statistics | None:
    return None if fisher is None else Collected(fisher)


def _stored(statistics: Statistics | None) -> BlockFisher:
    """Return the sums of statistics that were collected without a memory budget."""
    assert isinstance(statistics, Collected)
    return statistics.fisher
