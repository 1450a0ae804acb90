"""The rows of the table: ways to remove units without training, and with refitting."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

import fastsal
from benches.structured.subjects import Batches, Goal, Subject
from benches.structured.torch_pruning import torch_pruning_taylor
from fastsal.models.evaluating import to_model
from fastsal.pruning.structured.find import find

Method = Callable[[nn.Module, Batches, Goal, Subject], None]

_MEAN_ALONE = 1e12  # damping that keeps the weights as they are; the bias takes the mean


def structured(
    model: nn.Module, batches: Batches, goal: Goal, subject: Subject, **options: Any
) -> None:
    """`fastsal.prune_structure`."""
    fastsal.prune_structure(
        model,
        batches,
        goal.fraction,
        structure=goal.structure,
        budget=goal.budget,
        multiple=subject.multiple,
        **options,
    )


def taylor(
    model: nn.Module,
    batches: Batches,
    goal: Goal,
    subject: Subject,
    *,
    refit: fastsal.Refit | None = None,
) -> None:
    """Torch-Pruning's Taylor importance, on the units that fastsal finds."""
    first = next(model.parameters())
    there = [(to_model(x, model), y.to(first.device)) for x, y in batches]
    layers = [group.name for group in find(model, there[0][0][:2], goal.structure).groups]
    torch_pruning_taylor(model, there, goal, layers, subject.head)
    model.zero_grad()
    if refit is not None:
        kept = fastsal.Masks({n: torch.ones_like(p).bool() for n, p in model.named_parameters()})
        fastsal.refit(model, subject.model, batches, kept, refit)


# VBP: Berisha, Mehnert and Condurache, ICCV 2025: the variance of activations over all layers, and
# the mean of the removed units in the next bias. CORP: Zhang and Yang, arXiv 2602.05243: the same
# fraction of each layer, and an affine fold.
_VBP: dict[str, Any] = {"criterion": "variance", "damping": _MEAN_ALONE}
_CORP: dict[str, Any] = {"criterion": "variance", "scope": "layer"}
_MAGNITUDE: dict[str, Any] = {"criterion": "magnitude", "compensate": False}
_REFIT = fastsal.Refit()
peer = partial(structured, scope="global", reconstruct=False)

METHODS: Mapping[str, Method] = {
    "magnitude": partial(peer, **_MAGNITUDE),
    "magnitude, same width": partial(peer, **_MAGNITUDE, scope="layer"),
    "VBP: variance, mean alone": partial(peer, **_VBP),
    "VBP, same width": partial(peer, **_VBP, scope="layer"),
    "CORP: variance, same width, fold": partial(peer, **_CORP),
    "Torch-Pruning, Taylor": taylor,
    "magnitude, same width, fold": partial(peer, criterion="magnitude", scope="layer"),
    "joint, global": peer,
    "joint, same width": partial(peer, scope="layer"),
    "joint, widths by held-out features": partial(structured, reconstruct=False),
    "fastsal": structured,
    "magnitude, same width, refitted": partial(peer, **_MAGNITUDE, scope="layer", refit=_REFIT),
    "VBP, refitted": partial(peer, **_VBP, refit=_REFIT),
    "CORP, refitted": partial(peer, **_CORP, refit=_REFIT),
    "Torch-Pruning, Taylor, refitted": partial(taylor, refit=_REFIT),
    "fastsal, refitted": partial(structured, refit=_REFIT),
}
