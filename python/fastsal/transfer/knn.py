"""Heads that look at the nearest images: weighted k-nearest neighbours on features.

After the evaluation of Caron et al. (2021), "Emerging Properties in Self-Supervised Vision
Transformers" (arXiv 2104.14294), and Wu et al. (2018), "Unsupervised Feature Learning via
Non-Parametric Instance Discrimination" (arXiv 1805.01978): the k images of greatest cosine
similarity s vote for their class with weight `exp(s / T)`, k = 20, T = 0.07.

Axes: n images, m images that are kept, f features, k classes.
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

_CHUNK = 1024  # images whose similarities to all others are held at a time
_MOST_LEFT_OUT = 4096  # images, evenly spaced, that the scale is chosen on


@dataclass(frozen=True, eq=False)
class KnnHead:
    """The images that vote for the classes of one task.

    Attributes:
        task: the task's name.
        bank: features of unit length, float32 `[m, f]`.
        labels: their classes, int64 `[m]`.
        classes: the names of the classes.
        k: how many neighbours vote.
        temperature: T.
        spec: how the images were prepared; evaluation prepares them the same way.
        scale: what shares of votes are multiplied by where a softmax follows, as for `Head`.
    """

    task: str
    bank: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    k: int
    temperature: float
    spec: InputSpec
    scale: float = 1.0

    @property
    def features(self) -> int:
        """f, the number of features that it takes."""
        return self.bank.shape[1]

    @property
    def outputs(self) -> int:
        """k, the number of classes that it tells apart."""
        return len(self.classes)

    def __call__(self, x: Tensor) -> Tensor:
        """Map features `[n, f]` to shares of votes, float64 `[n, k]`: 0 or more, of sum 1.

        Features that are not finite give NaN.
        """
        bank = self.bank.to(x.device)
        pieces = [slice(i, i + _CHUNK) for i in range(0, max(len(x), 1), _CHUNK)]
        return torch.cat([self._votes(x[i].float(), bank) for i in pieces])

    def to(self, device: torch.device) -> KnnHead:
        """Return the head with its tensors on `device`."""
        return replace(self, bank=self.bank.to(device), labels=self.labels.to(device))

    def left_out(self, chosen: Tensor) -> Tensor:
        """Return what the head says of its own images `chosen` `[n]`, each without its own vote."""
        pieces = [chosen[i : i + _CHUNK] for i in range(0, len(chosen), _CHUNK)]
        return torch.cat([self._votes(self.bank[i], self.bank, exclude=i) for i in pieces])

    def _votes(self, x: Tensor, bank: Tensor, exclude: Tensor | None = None) -> Tensor:
        similarity = F.normalize(x, dim=1) @ bank.T
        if exclude is not None:
            similarity[torch.arange(len(x)), exclude] = -torch.inf
        k = min(self.k, len(bank) - (exclude is not None))
        nearest, place = similarity.topk(k, dim=1)
        # Over the greatest: the shares are the same, and no temperature overflows.
        weight = ((nearest - nearest[:, :1]).double() / self.temperature).exp()
        votes = weight.new_zeros(len(x), self.outputs)
        votes.scatter_add_(1, self.labels.to(x.device)[place], weight)
        votes /= votes.sum(dim=1, keepdim=True)
        return votes.masked_fill(~torch.isfinite(x).all(dim=1, keepdim=True), torch.nan)


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
    """Keep features `x` `[m, f]` and labels `y` `[m]` as a head.

    Raises:
        InvalidArgument: fewer than k + 1 images.
    """
    if len(x) <= k:
        raise InvalidArgument(
            f"k: got {k}; task {task!r} has {len(x)} images to fit on: takes 1 to {len(x) - 1}"
        )
    head = KnnHead(task, F.normalize(x.float(), dim=1), y, classes, k, temperature, spec)
    some = torch.arange(0, len(x), math.ceil(len(x) / _MOST_LEFT_OUT))
    counts = torch.bincount(y[some], minlength=len(classes)).clamp_min(1)
    return replace(head, scale=best_scale(head.left_out(some), y[some], counts))
