"""Notes about labels and the classifier, made in the first pass over the images."""

from __future__ import annotations

from torch import Tensor, nn

from fastsal.data.numbering import LossSign
from fastsal.gradients.losses import LossFunction
from fastsal.models.classifier_signs import check_classifier
from fastsal.utils.choices import Curvature


class LabelChecks:
    """Warns if the logits of a model, or the labels of its images, do not look right.

    Args:
        model: The model.
        loss: `"cross-entropy"`, or a function, whose outputs and labels may mean anything.
        curvature: Kind of statistics; features need neither logits nor labels.
    """

    def __init__(self, model: nn.Module, loss: str | LossFunction, curvature: Curvature) -> None:
        self._model = model
        self._is_open = loss == "cross-entropy" and curvature != "features"
        self._sign = LossSign() if self._is_open and curvature == "empirical" else None

    def begin(self, images: Tensor) -> None:
        """Check what the model returns for the first images `[n, ...]`."""
        if self._is_open and check_classifier(self._model, "statistics", images):
            self._sign = None  # the loss of features means nothing

    def add(self, losses: Tensor, outputs: int | None) -> None:
        """Add the losses of a micro-batch `[n]` from logits of `outputs` classes."""
        if self._is_open and self._sign is not None and outputs is not None:
            self._sign.add(losses.tolist(), outputs)

    def end(self) -> None:
        """End the first pass; later ones are over the same images."""
        if self._is_open and self._sign is not None:
            self._sign.warn()
        self._is_open = False
