"""Statistics of a source: one set serves all criteria, sparsities and dampings of its cells."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from fastsal.data.batches import Pair
from fastsal.data.held_out import holding_out, limited
from fastsal.data.image_set import ImageSet
from fastsal.fisher.block_fisher import BlockFisher
from fastsal.fisher.collection.collect import collect
from fastsal.gradients.losses import cross_entropy
from fastsal.models.evaluating import evaluating
from fastsal.models.inputs import InputSpec
from fastsal.pruning.measured import HeldOut, HeldOutFeatures, Measured
from fastsal.pruning.rounds import RoundStatistics
from fastsal.study.backbones import Backbone
from fastsal.study.images import SourcePart
from fastsal.study.settings.schema import SourceSettings, Study
from fastsal.transfer.headed import PREFIX, Headed
from fastsal.utils.choices import Curvature


@dataclass
class Source:
    """What pruning sees of one backbone, with one draw of images.

    Attributes:
        study: settings.
        settings: of the source.
        backbone: the model, dense when this is made.
        parts: its tasks and their images.
        seed: of the draw.
        curvature: of the statistics, as for `collect`.
        models: the backbone with the head of each part.
        seconds: that the statistics of the first round took.
        shared: those statistics, at the dense weights.
        targets: labels that fine-tuning learns, for each part.
        overlaps: rows of the table of that name, once they are known.
    """

    study: Study
    settings: SourceSettings
    backbone: Backbone
    parts: list[SourcePart]
    seed: int
    curvature: Curvature
    models: list[Headed] = field(init=False)
    targets: list[npt.NDArray[np.int64]] = field(init=False)
    seconds: float = 0.0
    shared: RoundStatistics | None = None
    overlaps: list[dict[str, Any]] | None = None

    def __post_init__(self) -> None:
        self.models = [
            Headed(self.backbone.model, [self.backbone.sources[part.task]]) for part in self.parts
        ]
        self.targets = [part.tune.y for part in self.parts]
        if self.settings.curvature != "empirical" and self.study.finetune is not None:
            self.targets = [
                predicted(model, part.tune, self.backbone.spec, self.study.batch_size)
                for model, part in zip(self.models, self.parts, strict=True)
            ]

    @property
    def parameters(self) -> list[str]:
        """Names of the pruned weights, as in `models`."""
        return [PREFIX + name for name in self.backbone.names]

    def find(self, number: int, *, dense: bool) -> RoundStatistics:
        """Statistics for one round; those at the dense weights are kept for other cells.

        Args:
            number: of the round, from 1: each has another seed for sampled labels.
            dense: whether the model is as it came.
        """
        if dense and self.shared is not None:
            return self.shared
        start = time.perf_counter()
        found = self._find(self.seed + number - 1)
        if dense:
            self.shared, self.seconds = found, time.perf_counter() - start
        return found

    def _find(self, seed: int) -> RoundStatistics:
        """One sample in eight is held out of what λ is chosen with, and joins it for the rest."""
        fisher: BlockFisher | None = None
        joined: BlockFisher | None = None
        tuned: list[tuple[float, Measured, nn.Module]] = []
        for part, model in zip(self.parts, self.models, strict=True):
            held: list[Pair] = []
            images = part.prune.batches(
                self.backbone.spec,
                self.study.batch_size,
                samples=part.samples,
                shuffle_seed=self.seed,
            )
            most = self._collect(model, holding_out(images, held), seed)
            whole = copy.deepcopy(most)
            whole.merge(self._collect(model, held, seed + 1000))
            tuned.append((part.weight, self._measured(model, limited(held)), model))
            fisher = self._add(fisher, most, part.weight)
            joined = self._add(joined, whole, part.weight)
        return RoundStatistics(fisher, lambda: joined, MixedHeldOut(tuned))

    def _measured(self, model: nn.Module, held: list[Pair]) -> Measured:
        """What λ is chosen by: the loss that the statistics are of."""
        if self.curvature == "features":
            return HeldOutFeatures.of(model, held)
        known = [(x, y if self.curvature == "empirical" else None) for x, y in held]
        return HeldOut.of(model, known, cross_entropy)

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

    def _collect(self, model: nn.Module, images: Iterable[Pair], seed: int) -> BlockFisher:
        return collect(
            model,
            images,
            block_size=self.study.block_size,
            curvature=self.curvature,
            parameters=self.parameters,
            seed=seed,
        )


@dataclass(frozen=True)
class MixedHeldOut:
    """Held-out images of several tasks, each behind its own head on the same backbone.

    Attributes:
        parts: weight, images, and the backbone with the head of each.
    """

    parts: list[tuple[float, Measured, nn.Module]]

    @property
    def samples(self) -> int:
        """Number of images."""
        return sum(held_out.samples for _, held_out, _ in self.parts)

    def mean_loss(self, _model: nn.Module) -> float:
        """Return the mean of the tasks' mean losses, by their weights."""
        total = sum(weight for weight, _, _ in self.parts)
        return sum(w * held_out.mean_loss(model) for w, held_out, model in self.parts) / total


def predicted(
    model: nn.Module, images: ImageSet, spec: InputSpec, batch_size: int
) -> npt.NDArray[np.int64]:
    """Return the classes that a model gives images, int64 `[n]`."""
    found = []
    with evaluating(model) as device, torch.no_grad():
        for x, _ in images.batches(spec, batch_size):
            found.append(model(x.to(device)).argmax(dim=1).cpu())
    return torch.cat(found).numpy().astype(np.int64)


def _empty(like: BlockFisher) -> BlockFisher:
    return BlockFisher(like.shapes, block_size=like.block_size, precision=like.precision)
