"""Test whether a pruned model is within a limit, on images that nothing else has used."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastsal.data.batches import Pair
from fastsal.data.held_out import Repeated
from fastsal.data.numbering import LossSign
from fastsal.data.stream_digest import StreamDigest
from fastsal.errors import DataError, InvalidArgument
from fastsal.gradients.losses import LossFunction, cross_entropy
from fastsal.models.classifier_signs import check_classifier
from fastsal.models.evaluating import outputs
from fastsal.pruning.limits.bound import is_below, upper_bound
from fastsal.pruning.limits.limit import Limit
from fastsal.pruning.limits.values import capped, check_measurable, is_right, losses_of
from fastsal.utils.float64 import in_float64


@dataclass(frozen=True)
class Values:
    """What was measured on one batch of test images.

    Attributes:
        limited: Value of each image `[n]` that the limit is about: its loss, at most the cap, or 0
            if it is classified correctly and 1 if not.
        losses: Loss of each image `[n]`, without a cap.
    """

    limited: Tensor
    losses: Tensor


class Examination:
    """The test of a limit: compares pruned models with the dense one on the test images.

    Only what is measured on each image is kept: images are read again for each model.

    Args:
        model: The dense model.
        batches: Pairs `(images, labels)`, the same in every iteration.
        limit: The limit.
        loss: `(outputs, labels)` to losses `[n]`.
        seed: Seed from which, and from the images, that of the order of the test is derived.

    Attributes:
        limit: The limit.
        images: Number of test images.
        dense: What was measured of the dense model, for each batch that is measured here.
        seed: Seed of the order in which the test takes the images.

    Raises:
        DataError: A batch has no labels, or labels are not classes of the model.
        InvalidArgument: There are no images, or the limit has no meaning for these outputs.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Pair],
        limit: Limit,
        loss: LossFunction,
        *,
        seed: int = 0,
    ) -> None:
        self.limit = limit
        self._loss = loss
        self._seen: StreamDigest | None = StreamDigest()
        self._batches = batches
        self._sign = LossSign() if loss is cross_entropy else None
        self.dense = self._values(model)
        digest, self._seen = self._seen, None
        if not digest.samples:
            raise InvalidArgument("samples leaves no images to test the limit on; increase it")
        if self._sign is not None:
            self._sign.warn()
        self._sign = None
        self.images = digest.samples
        self.seed = _seed_of(seed, digest)

    def _own(self, batches: Iterable[Pair]) -> Iterable[Pair]:
        """Those that are measured here."""
        return batches

    def _watched(self) -> Iterator[Pair]:
        """Iterate over all batches; the first time, they are counted and digested."""
        for images, labels in self._batches:
            if self._seen is not None:
                self._seen.add(images, labels)
            yield images, labels

    def _values(self, model: nn.Module) -> list[Values]:
        """Measure a model on each of the batches that are measured here."""
        limit = self.limit
        found: list[Values] = []
        for images, given in self._own(Repeated(self._watched)):
            if given is None:
                raise DataError("labels must not be None: a limit is tested on labeled images")
            out = outputs(model, images)
            labels = given.to(out.device)
            if self._seen is not None:
                check_measurable(limit, self._loss, out, labels)
            losses = losses_of(self._loss, out, labels)
            if self._sign is not None:  # wrong labels: then no drop of the accuracy is large
                if not found and check_classifier(model, "accuracy", images):
                    self._sign = None
                else:
                    self._sign.add(losses.tolist(), out.shape[1])
            if limit.kind == "accuracy":
                limited = 1 - in_float64(is_right(out, labels))
            else:
                assert limit.cap is not None  # see `Limit.with_cap`
                limited = capped(losses, limit.cap)
            found.append(Values(limited.cpu(), losses.cpu()))
        return found

    def measured(self, model: nn.Module) -> list[tuple[Tensor, Tensor]]:
        """Return for each batch the increase and the loss increase of its images."""
        pairs = zip(self._values(model), self.dense, strict=True)
        return [
            (now.limited - dense.limited, in_float64(now.losses - dense.losses))
            for now, dense in pairs
        ]

    def __call__(self, model: nn.Module) -> dict[str, Any]:
        """Measure a pruned model; returns a point of `SafetyReport.curve`."""
        found = self.measured(model)
        each, rise = (torch.cat(values) for values in zip(*found, strict=True))
        low, high = (-1.0, 1.0) if self.limit.cap is None else (-self.limit.cap, self.limit.cap)
        how = low, high, self.limit.confidence, self.seed
        return {
            "increase": float(each.mean()),
            "upper": upper_bound(each.numpy(), *how),
            "keeps": is_below(each.numpy(), self.limit.most, *how),
            "loss_increase": float(rise.mean()),
            "loss_error": float(rise.std(correction=0)) / len(rise) ** 0.5,
        }


def _seed_of(seed: int, digest: StreamDigest) -> int:
    """Return a seed that differs between seeds and between images; exact in a JSON number."""
    text = f"{seed}\0".encode() + digest.value()
    return int.from_bytes(hashlib.blake2b(text, digest_size=6).digest(), "little")
