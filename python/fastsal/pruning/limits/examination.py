"""Test whether a pruned model is within a limit, on images that nothing else has used."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fastsal.data.batches import Pair
from fastsal.errors import DataError, InvalidArgument
from fastsal.gradients.losses import LossFunction
from fastsal.models.evaluating import outputs
from fastsal.pruning.limits.bound import is_below, upper_bound
from fastsal.pruning.limits.limit import Limit, differences, losses_of
from fastsal.pruning.measured import loss_of_guessing
from fastsal.utils.float64 import in_float64


class Examination:
    """The test of a limit: compares pruned models with the dense one on the test images.

    Args:
        model: The dense model.
        batches: Pairs `(images, labels)`.
        limit: The limit.
        loss: `(outputs, labels)` to losses `[n]`.

    Raises:
        DataError: A batch has no labels.
        InvalidArgument: There are no images.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Pair],
        limit: Limit,
        loss: LossFunction,
    ) -> None:
        self.limit = limit
        self._loss = loss
        found: list[tuple[Tensor, Tensor]] = []
        for images, labels in batches:
            if labels is None:
                raise DataError("labels must not be None: a limit is tested on labeled images")
            found.append((images, labels))
        if not found:
            raise InvalidArgument("samples leaves no images to test the limit on; increase it")
        self._batches = self._own(found)
        self._dense = [outputs(model, images) for images, _ in self._batches]
        # On the model's device, where the loss may have weights of classes.
        self._losses = [
            losses_of(loss, dense, labels.to(dense.device))
            for dense, (_, labels) in zip(self._dense, self._batches, strict=True)
        ]
        has_cap = limit.kind == "loss" and self._dense
        self.cap = loss_of_guessing(self._dense[0]) if has_cap else None

    def _own(self, batches: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """Those that are measured here."""
        return batches

    @property
    def images(self) -> int:
        """Number of test images."""
        return sum(len(out) for out in self._dense)

    def measured(self, model: nn.Module) -> list[tuple[Tensor, Tensor]]:
        """Return for each batch the increase and the loss increase of its images."""
        found = []
        known = zip(self._batches, self._dense, self._losses, strict=True)
        for (images, labels), dense, losses in known:
            out = outputs(model, images)
            target = labels.to(out.device)
            both = losses, losses_of(self._loss, out, target)
            values = differences(self.limit, dense, out, both, target)
            found.append((values.cpu(), in_float64(both[1] - both[0]).cpu()))
        return found

    def __call__(self, model: nn.Module) -> dict[str, Any]:
        """Measure a pruned model; returns a point of `SafetyReport.curve`."""
        found = self.measured(model)
        each, rise = (torch.cat(values) for values in zip(*found, strict=True))
        low, high = (-1.0, 1.0) if self.cap is None else (-self.cap, self.cap)
        confidence = self.limit.confidence
        return {
            "increase": float(each.mean()),
            "upper": upper_bound(each.numpy(), low, high, confidence),
            "keeps": is_below(each.numpy(), self.limit.most, low, high, confidence),
            "loss_increase": float(rise.mean()),
            "loss_error": float(rise.std(correction=0)) / len(rise) ** 0.5,
        }
