"""Ridge heads on the features of a model, as a measure of these features."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastsal.models.evaluating import to_model
from fastsal.models.features import features
from fastsal.transfer.ridge import solve_ridge

RIDGES = (1e-3, 1e-2, 1e-1)


def all_features(model: nn.Module, x: Tensor) -> Tensor:
    """Return features on the CPU, in batches."""
    return torch.cat([features(model, to_model(some, model)).cpu() for some in x.split(32)])


class Heads:
    """A ridge head on the dense features; the ridge with the best leave-one-out accuracy."""

    def __init__(self, f: Tensor, y: Tensor) -> None:
        counts = torch.bincount(y)
        found = []
        for ridge in RIDGES:
            weight, bias, _, left_out = solve_ridge(f, y, counts, ridge)
            found.append((float((left_out.argmax(1) == y).double().mean()), weight, bias))
        _, self.weight, self.bias = max(found, key=lambda each: each[0])

    def accuracy(self, f: Tensor, y: Tensor) -> float:
        """Return the accuracy on features."""
        return float(((f.double() @ self.weight.T + self.bias).argmax(1) == y).double().mean())
