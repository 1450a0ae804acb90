"""A pruning job: a model, its images and a recipe."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from fastsal.data.batches import Batches, Pair, as_batches, in_micro_batches
from fastsal.fisher.statistics import Statistics
from fastsal.gradients import choose_micro_batch
from fastsal.gradients.losses import LABEL_USE, LossFunction
from fastsal.pruning.limits.examination import Examination
from fastsal.pruning.limits.limit import Limit
from fastsal.pruning.measured import HeldOut, HeldOutFeatures, InMicroBatches, Measured
from fastsal.pruning.process import Process
from fastsal.pruning.recipe import Recipe
from fastsal.pruning.shelf import Shelf, all_or_nothing, restore
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
        dense: With `curvature="features"`, name to the weights whose features are matched; None
            where the model has them.
        process: Computes statistics, scores, masks and weights.
        shelf: Where copies of weights and scores are stored.
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

    @property
    def step(self) -> Step:
        """One step of pruning."""
        return Step(self.model, self.chosen, self.recipe, self.process, self.shelf)

    def source(self) -> Iterable[Pair]:
        """Return the validated images; empty without images."""
        if self.batches is None:
            return ()
        return as_batches(self.batches, self.samples, LABEL_USE[self.statistics["curvature"]])

    def held_out(self, images: list[Pair], fisher: Statistics | None = None) -> Measured:
        """Return held-out images on which the loss of models is measured.

        The loss is that of the labels or, with `curvature="features"`, of matching the features of
        the dense model. The images run in micro-batches of the size that the statistics use, so
        that losses round in the same way with and without a memory budget.
        """
        asked = self.statistics["micro_batch"]
        size = planned_micro_batch(fisher) or asked or choose_micro_batch(self.chosen)
        batches = list(in_micro_batches(images, size, size))
        return self.process.held_out(batches, self._with_targets)

    def _with_targets(self, batches: list[Pair]) -> InMicroBatches:
        if self.statistics["curvature"] != "features":
            return HeldOut.of(self.model, batches, self.loss)
        all_features = self.process.all_features
        if self.dense is None:
            return HeldOutFeatures.of(self.model, batches, all_features)
        present = self.shelf.put("present", self.chosen)
        restore(self.chosen, self.dense)
        try:
            return HeldOutFeatures.of(self.model, batches, all_features)
        finally:
            restore(self.chosen, present)

    def examination(
        self, images: list[Pair], limit: Limit, fisher: Statistics | None
    ) -> Examination:
        """Return the test of a limit on images."""
        if size := planned_micro_batch(fisher):
            images = list(in_micro_batches(images, size, size))
        return self.process.examination(self.model, images, limit, self.loss)

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

    def joining(self, fisher: Statistics, held: list[Pair], seed: int) -> Callable[[], None]:
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
        return all_or_nothing(self.chosen, self.shelf)


def planned_micro_batch(fisher: Statistics | None) -> int | None:
    """Return the micro-batch size within the memory budget; None without a budget."""
    return None if fisher is None or fisher.plan is None else fisher.plan.micro_batch
