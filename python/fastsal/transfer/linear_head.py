"""A linear head for a task.

Axes: n images, f features, k classes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from fastsal.models.inputs import InputSpec
from fastsal.utils.float64 import float64_device, in_float64


@dataclass(frozen=True, eq=False, repr=False)
class Head:
    """A frozen linear head `x ↦ W x + b` for one task.

    Attributes:
        task: Name of the task.
        weight: W, float64 `[k, f]`.
        bias: b, float64 `[k]`.
        classes: Names of the classes.
        alpha: Absolute ridge penalty α, or the L2 penalty of a probe.
        spec: Preprocessing of the images, in fitting and in evaluation.
        scale: Factor on the logits before a softmax. It minimizes the leave-one-out cross-entropy
            on the fit images; 1 for a probe, which is fitted by cross-entropy.
        kind: `"ridge"` or `"probe"`.
    """

    task: str
    weight: Tensor
    bias: Tensor
    classes: tuple[str, ...]
    alpha: float
    spec: InputSpec
    scale: float = 1.0
    kind: Literal["ridge", "probe"] = "ridge"

    def __repr__(self) -> str:
        return (
            f"Head({self.task!r}, {self.kind}, {self.features} features, {self.outputs} classes, "
            f"alpha={self.alpha:.3g})"
        )

    @property
    def features(self) -> int:
        """Number of input features, f."""
        return self.weight.shape[1]

    @property
    def outputs(self) -> int:
        """Number of classes, k."""
        return len(self.bias)

    def __call__(self, x: Tensor) -> Tensor:
        """Map features `[n, f]` to the outputs of the regression, float64 `[n, k]`, not scaled."""
        x = in_float64(x)
        return x @ self.weight.to(x.device).T + self.bias.to(x.device)

    def to(self, device: torch.device) -> Head:
        """Return a copy of the head with its tensors on `device`."""
        device = float64_device(device)
        return replace(self, weight=self.weight.to(device), bias=self.bias.to(device))

    def linear(self) -> nn.Linear:
        """Return `scale · (W x + b)` as a frozen float32 `nn.Linear`."""
        layer = nn.Linear(self.weight.shape[1], self.weight.shape[0])
        with torch.no_grad():
            layer.weight.copy_(self.scale * self.weight)
            layer.bias.copy_(self.scale * self.bias)
        return layer.requires_grad_(False)
