"""Weighted k-nearest neighbor classification on features.

Follows the evaluation of Caron et al. (2021), "Emerging Properties in Self-Supervised Vision
Transformers" (arXiv 2104.14294), and Wu et al. (2018), "Unsupervised Feature Learning via
Non-Parametric Instance Discrimination" (arXiv 1805.01978): the k images with the highest cosine
similarity s vote for their class with weight `exp(s / T)`; k = 20, T = 0.07 by default.

Axes: n images, m stored images, f features, k classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsal.errors import InvalidArgument
from fastsal.models.inputs import InputSpec
from fastsal.transfer.ridge import best_scale
from fastsal.utils.float64 import in_float64

_CHUNK = 1024  # images whose similarities to all stored images are in memory at once
_MOST_LEFT_OUT = 4096  # images, evenly spaced, that the scale is fitted on


@dataclass(frozen=True, eq=False, repr=False)
class KnnHead:
    """A k-nearest neighbor classifier for one task.

    Attributes:
        task: Name of the task.
        bank: Features of the stored images, normalized to unit length, float32 `[m, f]`.
        labels: Classes of the stored images, int64 `[m]`.
        classes: Names of the classes.
        k: Number of neighbors that vote.
        temperature: Temperature T of the weights.
        spec: Preprocessing of the images, in fitting and in evaluation.
        scale: Factor on the shares of votes before a softmax, as in `Head`.
    """

    task: str
    bank: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    k: int
    temperature: float
    spec: InputSpec
    scale: float = 1.0

    def __repr__(self) -> str:
        m, f = self.bank.shape
        return (
            f"KnnHead({self.task!r}, {m} images, {f} features, {self.outputs} classes, k={self.k})"
        )

    @property
    def features(self) -> int:
        """Number of input features, f."""
        return self.bank.shape[1]

    @property
    def outputs(self) -> int:
        """Number of classes, k."""
        return len(self.classes)

    def __call__(self, x: Tensor) -> Tensor:
        """Map features `[n, f]` to shares of votes, float64 `[n, k]`, non-negative with sum 1.

        Non-finite features give NaN.
        """
        bank = self.bank.to(x.device)
        pieces = [slice(i, i + _CHUNK) for i in range(0, max(len(x), 1), _CHUNK)]
        return torch.cat([self._votes(x[i].float(), bank) for i in pieces])

    def to(self, device: torch.device) -> KnnHead:
        """Return a copy of the head with its tensors on `device`."""
        return replace(self, bank=self.bank.to(device), labels=self.labels.to(device))

    def left_out(self, chosen: Tensor) -> Tensor:
        """Return leave-one-out shares of votes `[n, k]` for the stored images `chosen` `[n]`."""
        pieces = [chosen[i : i + _CHUNK] for i in range(0, len(chosen), _CHUNK)]
        return torch.cat([self._votes(self.bank[i], self.bank, exclude=i) for i in pieces])

    def _votes(self, x: Tensor, bank: Tensor, exclude: Tensor | None = None) -> Tensor:
        similarity = F.normalize(x, dim=1) @ bank.T
        if exclude is not None:
            similarity[torch.arange(len(x), device="cpu"), exclude] = -torch.inf
        k = min(self.k, len(bank) - (exclude is not None))
        nearest, place = similarity.topk(k, dim=1)
        # Relative to the nearest: the shares are equal, and exp does not overflow.
        weight = (in_float64(nearest - nearest[:, :1]) / self.temperature).exp()
        votes = weight.new_zeros(len(x), self.outputs)
        votes.scatter_add_(1, self.labels.to(weight.device)[place.to(weight.device)], weight)
        votes /= votes.sum(dim=1, keepdim=True)
        wrong = ~torch.isfinite(x).all(dim=1, keepdim=True)
        return votes.masked_fill(wrong.to(votes.device), torch.nan)


def fit_knn(
    task: str,
    x: Tensor,
    y: Tensor,
    classes: tuple[str, ...],
    spec: InputSpec,
    *,
    k: int = 20,
    temperature: float = 0.07,
) -> KnnHead:
    """Store features `x` `[m, f]` and labels `y` `[m]` as a head, and fit its scale.

    Raises:
        InvalidArgument: There are fewer than k + 1 images.
    """
    if len(x) <= k:
        raise InvalidArgument(
            f"k must be in [1, {len(x) - 1}] for the {len(x)} fit images of task {task!r}, got {k}"
        )
    head = KnnHead(task, F.normalize(x.float(), dim=1), y, classes, k, temperature, spec)
    some = torch.arange(0, len(x), math.ceil(len(x) / _MOST_LEFT_OUT), device="cpu")
    counts = torch.bincount(y[some], minlength=len(classes)).clamp_min(1)
    return replace(head, scale=best_scale(head.left_out(some), y[some], counts))
