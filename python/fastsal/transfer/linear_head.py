"""The head of a task that is one linear layer.

Axes: n images, f features, k classes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fastsal.models.inputs import InputSpec


@dataclass(frozen=True, eq=False)
class Head:
    """A frozen linear head `x ↦ W x + b` for one task.

    Attributes:
        task: the task's name.
        weight: W, float64 `[k, f]`.
        bias: b, float64 `[k]`.
        classes: the names of the classes.
        alpha: the absolute ridge α; of a probe, the L2 penalty.
        spec: how the images were prepared; evaluation prepares them the same way.
        scale: what logits are multiplied by, at equal argmax, where a softmax follows: the value
            of least leave-one-out cross-entropy on the images that the head was fitted on; 1 for
            a probe, which is fitted by its cross-entropy.
        kind: how it was fitted, "ridge" or "probe".
    """

    task: str
    weight: Tensor
    bias: Tensor
    classes: tuple[str, ...]
    alpha: float
    spec: InputSpec
    scale: float = 1.0
    kind: str = "ridge"

    @property
    def features(self) -> int:
        """f, the number of features that it takes."""
        return self.weight.shape[1]

    @property
    def outputs(self) -> int:
        """k, the number of classes that it tells apart."""
        return len(self.bias)

    def __call__(self, x: Tensor) -> Tensor:
        """Map features `[n, f]` to the regression's own outputs, float64 `[n, k]`."""
        return x.double() @ self.weight.to(x.device).T + self.bias.to(x.device)

    def to(self, device: torch.device) -> Head:
        """Return the head with its tensors on `device`."""
        return replace(self, weight=self.weight.to(device), bias=self.bias.to(device))

    def linear(self) -> nn.Linear:
        """Return `scale · (W x + b)` as a float32 layer whose parameters need no gradient."""
        layer = nn.Linear(self.weight.shape[1], self.weight.shape[0])
        with torch.no_grad():
            layer.weight.copy_(self.scale * self.weight)
            layer.bias.copy_(self.scale * self.bias)
        return layer.requires_grad_(False)
