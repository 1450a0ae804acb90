"""Scores of units that do not depend on which other units go."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastsal.pruning.structured.groups import Group, tensor_of
from fastsal.utils.float64 import in_float64


def simple_scores(model: nn.Module, group: Group, criterion: str, variance: Tensor, seed: int) -> (
    Tensor
):  # fmt: skip
    """Return scores of units that do not depend on which others go, `[m]`, float64.

    Args:
        model: The model.
        group: The group.
        criterion: `"magnitude"`: the product of the norms of the weights that make and that use a
            unit; `"variance"`: of its activations; `"random"`.
        variance: Variances of the columns of the consumer, `[D]`.
        seed: Seed of `"random"`.
    """
    if criterion == "random":
        draw = torch.Generator().manual_seed(seed)
        return torch.rand(group.units, generator=draw, dtype=torch.float64, device="cpu")
    if criterion == "variance":
        return variance.view(group.units, -1).mean(dim=1)
    squares = {0: torch.zeros(group.units, dtype=torch.float64, device="cpu")}
    squares[1] = squares[0].clone()
    for part in group.slices:
        if part.tensor == "weight" and part.module in {*group.producers, *group.consumers}:
            value = in_float64(tensor_of(model, part).detach().cpu()).movedim(part.axis, 0)
            each = value.flatten(1).square().sum(dim=1)
            squares[part.axis] += each[part.index].sum(dim=1)
    return (squares[0] * squares[1]).sqrt()
