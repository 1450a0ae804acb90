"""Torch-Pruning's Taylor importance, for comparison only (extra `bench`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_STEPS = 60


def torch_pruning_taylor(
    model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]], fraction: float
) -> None:
    """Remove channels in place, by `GroupTaylorImportance` over all layers, in small steps.

    The importance is the product of weights and gradients of the loss at the labels. Gradients are
    computed again before each step. Linear layers keep their outputs.

    Args:
        model: The model, in evaluation mode.
        batches: Images `[n, ...]` and labels.
        fraction: Fraction of the multiply-accumulates to remove.
    """
    import torch_pruning

    images = batches[0][0][:1]
    pruner = torch_pruning.pruner.BasePruner(
        model,
        images,
        importance=torch_pruning.importance.GroupTaylorImportance(),
        global_pruning=True,
        pruning_ratio=0.9,
        iterative_steps=_STEPS,
        ignored_layers=[layer for layer in model.modules() if isinstance(layer, nn.Linear)],
    )
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    whole, _ = torch_pruning.utils.count_ops_and_params(model, images)
    for _ in range(_STEPS):
        model.zero_grad()
        for some, labels in batches:
            for x, y in zip(some.split(64), labels.split(64), strict=True):
                torch.autograd.backward(F.cross_entropy(model(x), y))
        pruner.step()
        left, _ = torch_pruning.utils.count_ops_and_params(model, images)
        if left <= (1 - fraction) * whole:
            return
