"""Test whether a pruned model is within a limit, on images that nothing else has used."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fastsal.data.batches import Pair
from fastsal.data.numbering import LossSign
from fastsal.errors import DataError, InvalidArgument
from fastsal.gradients.losses import LossFunction, cross_entropy
from fastsal.models.classifier_signs import check_classifier
from fastsal.models.evaluating import outputs
from fastsal.pruning.limits.bound import is_below, upper_bound
from fastsal.pruning.limits.limit import Limit, differences, losses_of
from fastsal.pruning.measured import loss_of_guessing


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
        self._dense = [outputs(model, images).cpu() for images, _ in self._batches]
        self._losses = [
            losses_of(loss, dense, labels.cpu())
            for dense, (_, labels) in zip(self._dense, self._batches, strict=True)
        ]
        self._check_labels(model)
        has_cap = limit.kind == "loss" and self._dense
        self.cap = loss_of_guessing(self._dense[0]) if has_cap else None

    def _check_labels(self, model: nn.Module) -> None:
        """Warn if labels or logits do not look right: then any drop of the accuracy is small."""
        if self._loss is not cross_entropy or not self._dense:
            return
        if check_classifier(model, "accuracy", self._batches[0][0]):
            return
        sign = LossSign()
        for losses, dense in zip(self._losses, self._dense, strict=True):
            sign.add(losses.tolist(), dense.shape[1])
        sign.warn()

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
            out, target = outputs(model, images).cpu(), labels.cpu()
            both = losses, losses_of(self._loss, out, target)
            values = differences(self.limit, dense, out, both, target)
            found.append((values, (both[1] - both[0]).double()))
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
