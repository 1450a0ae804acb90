"""Torch-Pruning's Taylor importance, for comparison only (extra `bench`)."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benches.structured.subjects import Goal

_STEPS = 20


def torch_pruning_taylor(
    model: nn.Module,
    batches: Sequence[tuple[Tensor, Tensor]],
    goal: Goal,
    layers: Collection[str],
    head: nn.Linear | None,
) -> None:
    """Remove units in place, by `GroupTaylorImportance` over the given layers, in small steps.

    The importance is the product of weights and gradients of the loss at the labels. Gradients are
    computed again before each step.

    Args:
        model: The model, in evaluation mode.
        batches: Images `[n, ...]` and labels.
        goal: What to remove, of MLPs or channels.
        layers: Names of the layers whose outputs are units.
        head: Classifier of the outputs of the model; None if these are logits.
    """
    import torch_pruning

    images = batches[0][0][:1]
    roots = {model.get_submodule(name) for name in layers}
    by_macs = goal.budget == "macs"
    pruner = torch_pruning.pruner.BasePruner(
        model,
        images,
        importance=torch_pruning.importance.GroupTaylorImportance(),
        global_pruning=True,
        pruning_ratio=0.9 if by_macs else goal.fraction,
        iterative_steps=3 * _STEPS if by_macs else _STEPS,
        ignored_layers=[
            layer
            for layer in model.modules()
            if isinstance(layer, (nn.Linear, nn.Conv2d))
            and layer not in roots
            and getattr(layer, "groups", 1) == 1
        ],
    )
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    whole, _ = torch_pruning.utils.count_ops_and_params(model, images)
    for _ in range(pruner.iterative_steps):
        model.zero_grad()
        for x, y in batches:
            logits = model(x) if head is None else head(model(x))
            torch.autograd.backward(F.cross_entropy(logits, y))
        pruner.step()
        if by_macs:
            left, _ = torch_pruning.utils.count_ops_and_params(model, images)
            if left <= (1 - goal.fraction) * whole:
                return
