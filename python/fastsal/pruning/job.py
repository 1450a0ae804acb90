"""A pruning job: a model, its images and a recipe."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from fastsal.data.batches import Batches, Pair, Source, in_micro_batches
from fastsal.data.class_order import size_of
from fastsal.data.content import RecordedSource, SeenImages
from fastsal.data.held_out import HELD_OUT_EVERY, HELD_OUT_MOST, HeldOutSamples, Repeated
from fastsal.data.image_set import ImageBatches
from fastsal.data.unpacking import LabelUse
from fastsal.fisher.statistics import Statistics
from fastsal.gradients import choose_micro_batch
from fastsal.gradients.losses import LABEL_USE, LossFunction
from fastsal.pruning.limits.examination import Examination
from fastsal.pruning.limits.limit import Limit
from fastsal.pruning.measured import HeldOut, HeldOutFeatures, InMicroBatches, Measured
from fastsal.pruning.process import Process
from fastsal.pruning.recipe import Recipe
from fastsal.pruning.reconstruction.stage import ReconstructionStage
from fastsal.pruning.refit.stage import RefitStage
from fastsal.pruning.shelf import Shelf, all_or_nothing, restore, tensors_of
from fastsal.pruning.step import Step


@dataclass(frozen=True)
class Job:
    """A model, its images, and how to prune it.

    Attributes:
        model: The model, pruned in place.
        batches: Images and labels, as `prune` received them.
        samples: Samples of each round; None for all.
        recipe: How to prune.
        chosen: Name to parameter that may be pruned.
        statistics: Arguments of `collect` except model, batches, samples and seed.
        loss: `(outputs, labels)` to losses `[n]`.
        dense: With `curvature="features"`, name to the tensors of `changed` in the model whose
            features are matched; None where the model has them.
        process: Computes statistics, scores, masks and weights.
        shelf: Where copies of weights and scores are stored.
        refit: How the pruned model is refitted to the dense one, or None.
        reconstruction: How its layers are solved for, or None.
        seen: Records the images that passes see, for a checkpoint; None without one.
    """

    model: nn.Module
    batches: Batches | None
    samples: int | None
    recipe: Recipe
    chosen: Mapping[str, nn.Parameter]
    statistics: dict[str, Any]
    loss: LossFunction
    dense: Mapping[str, Tensor] | None = None
    process: Process = field(default_factory=Process)
    shelf: Shelf = field(default_factory=Shelf)
    seen: SeenImages | None = None
    refit: RefitStage | None = None
    reconstruction: ReconstructionStage | None = None

    @property
    def step(self) -> Step:
        """One step of pruning."""
        return Step(self.model, self.chosen, self.recipe, self.process, self.shelf)

    @property
    def keeps_images(self) -> bool:
        """Whether held-out images are kept in memory: without a budget, or if they come once."""
        budget = self.statistics.get("memory_budget")
        return budget is None or isinstance(self.batches, Iterator)

    def source(self) -> Iterable[Pair]:
        """Return the validated images, the same in every iteration; empty without images.

        `seen` records what complete iterations see.
        """
        if self.batches is None or self.seen is None:
            return self.images()
        return RecordedSource(self.batches, self.samples, self._label_use, self.seen)

    def images(self) -> Iterable[Pair]:
        """Return the validated images, which are not recorded; empty without images."""
        if self.batches is None:
            return ()
        return Source(self.batches, self.samples, self._label_use)

    @property
    def _label_use(self) -> LabelUse:
        return LABEL_USE[self.statistics["curvature"]]

    @property
    def total(self) -> int | None:
        """Number of images; None if it is unknown before a pass."""
        return self.samples or (None if self.batches is None else size_of(self.batches))

    def tuning_samples(self, source: Iterable[Pair], total: int | None) -> HeldOutSamples:
        """Return the samples that are held out for the choice of a damping.

        Args:
            source: The images that they are held out of.
            total: Number of these images, if known.
        """
        if total is None and not self.keeps_images:
            total = sum(len(images) for images, _ in source)
        return HeldOutSamples(
            source.__iter__,
            HELD_OUT_EVERY,
            seed=self.recipe.seed,
            most=HELD_OUT_MOST,
            total=total,
            room=None if self.keeps_images else 0,
            pick=self.pick(source),
        )

    def pick(self, source: Iterable[Pair]) -> Callable[[NDArray[np.int64]], Iterable[Pair]] | None:
        """Return a function that reads the images at some places of a source; None if unknown.

        Args:
            source: The images of the job, or others.
        """
        batches = self.batches
        if not isinstance(source, Source) or not isinstance(batches, ImageBatches):
            return None
        order = batches.order
        return lambda places: replace(batches, order=order[places])

    def held_out(self, images: Iterable[Pair], fisher: Statistics | None = None) -> Measured:
        """Return held-out images on which the loss of models is measured.

        The loss is that of the labels or, with `curvature="features"`, of matching the features of
        the dense model. The images run in micro-batches of the size that the statistics use, so
        that losses round in the same way with and without a memory budget.
        """
        asked = self.statistics["micro_batch"]
        size = planned_micro_batch(fisher) or asked or choose_micro_batch(self.chosen)
        batches = Repeated(lambda: in_micro_batches(images, size, size))
        return self.process.held_out(batches, self._with_targets)

    def _with_targets(self, batches: Iterable[Pair]) -> InMicroBatches:
        if self.statistics["curvature"] != "features":
            return HeldOut.of(self.model, batches, self.loss)
        all_features = self.process.all_features
        if self.refit is not None:
            return HeldOutFeatures.of(self.refit.dense, batches, all_features)
        if self.dense is None:
            return HeldOutFeatures.of(self.model, batches, all_features)
        present = self.shelf.put("present", self.changed)
        restore(self.changed, self.dense)
        try:
            return HeldOutFeatures.of(self.model, batches, all_features)
        finally:
            restore(self.changed, present)

    def examination(
        self, images: Iterable[Pair], limit: Limit, fisher: Statistics | None
    ) -> Examination:
        """Return the test of a limit on images."""
        batches = images
        if size := planned_micro_batch(fisher):
            batches = Repeated(lambda: in_micro_batches(images, size, size))
        return self.process.examination(
            self.model, batches, limit, self.loss, seed=self.recipe.seed
        )

    def collect(self, source: Iterable[Pair], seed: int, *, quiet: bool = False) -> Statistics:
        """Collect the statistics of images."""
        if isinstance(self.batches, Iterator):
            source = iter(source)  # shows that it can be iterated only once
        return self.process.collect(self.model, source, **self._options(seed, quiet=quiet))

    def _options(self, seed: int, *, quiet: bool) -> dict[str, Any]:
        """Return the arguments of `collect` except model and images."""
        # Later rounds are at pruned weights, whose loss says nothing about the labels.
        is_first = seed == self.recipe.seed and not quiet
        options = {**self.statistics, "seed": seed, "checks_labels": is_first}
        return options | ({"progress": False} if quiet else {})

    def joining(self, fisher: Statistics, held: Iterable[Pair], seed: int) -> Callable[[], None]:
        """Return a function that adds held-out images to statistics, in place.

        Without a memory budget their statistics are collected now, with a budget when the function
        is called. The model must have the same weights then.
        """
        if fisher.plan is not None:
            options = self._options(seed, quiet=True)
            return lambda: self.process.add_samples(fisher, self.model, held, **options)
        rest = self.collect(held, seed, quiet=True)
        return lambda: fisher.merge(rest)

    def all_or_nothing(self) -> contextlib.AbstractContextManager[dict[str, Tensor]]:
        """Restore the weights if the block raises; yields a copy of them."""
        return all_or_nothing(self.changed, self.shelf)

    @property
    def changed(self) -> Mapping[str, Tensor]:
        """The tensors that the job may change: reconstruction and refitting change all."""
        changes_all = self.refit is not None or self.reconstruction is not None
        return tensors_of(self.model) if changes_all else self.chosen


def planned_micro_batch(fisher: Statistics | None) -> int | None:
    """Return the micro-batch size within the memory budget; None without a budget."""
    return None if fisher is None or fisher.plan is None else fisher.plan.micro_batch
