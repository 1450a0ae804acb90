"""The rows of the table: ways to prune a model with unlabeled images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import nn

import fastsal
from benches.quality import peers
from fastsal.pruning.damping import resolve_damping
from fastsal.pruning.recalibration import recalibrate

Batches = list[tuple[torch.Tensor, None]]
Method = Callable[[nn.Module, Batches, float], None]

REFIT_STEPS = 200


def _magnitude(model: nn.Module, sparsity: float) -> fastsal.Masks:
    masks = fastsal.rank(fastsal.score(model, None, "magnitude"), sparsity)
    masks.apply(model)
    return masks


def magnitude(
    model: nn.Module,
    batches: Batches,
    sparsity: float,
    *,
    recalibrated: bool = False,
    reconstructed: bool = False,
    refitted: bool = False,
) -> None:
    """Prune the smallest weights of the whole model."""
    dense = deepcopy(model)
    masks = _magnitude(model, sparsity)
    if reconstructed:
        fastsal.reconstruct(model, dense, batches, masks)
    if recalibrated:
        recalibrate(model, batches)
    if refitted:
        fastsal.refit(model, dense, batches, masks, fastsal.Refit(steps=REFIT_STEPS))


def obert(model: nn.Module, batches: Batches, sparsity: float) -> None:
    """Block-fisher scores and the update that treats pruned weights independently."""
    fisher = fastsal.collect(model, batches, curvature="features")
    damping = resolve_damping("0.1x", fisher)
    masks = fastsal.rank(fastsal.score(model, fisher, "block-fisher", damping), sparsity)
    peers.independent_update(model, fisher, masks, damping)
    recalibrate(model, batches)


def peer(
    model: nn.Module,
    batches: Batches,
    sparsity: float,
    *,
    rule: peers.Rule,
    recalibrated: bool = True,
    refitted: bool = False,
) -> None:
    """One of the peers that prune layer by layer; batch normalization is recalibrated."""
    dense = deepcopy(model)
    images = torch.cat([x for x, _ in batches])
    masks = peers.layer_by_layer(model, images, rule, float(sparsity))
    if recalibrated:
        recalibrate(model, batches)
    if refitted:
        fastsal.refit(model, dense, batches, masks, fastsal.Refit(steps=REFIT_STEPS))


def prune(model: nn.Module, batches: Batches, sparsity: float, **options: Any) -> None:
    """`fastsal.prune` with features."""
    result = fastsal.prune(model, batches, sparsity, curvature="features", **options)
    result.masks.verify(model)


METHODS: Mapping[str, Method] = {
    "magnitude": magnitude,
    "magnitude, recalibrated": partial(magnitude, recalibrated=True),
    "magnitude, reconstructed": partial(magnitude, reconstructed=True),
    "Wanda, recalibrated": partial(peer, rule=peers.wanda),
    "SparseGPT, recalibrated": partial(peer, rule=peers.sparse_gpt),
    "OBC on Σxxᵀ, recalibrated": partial(peer, rule=peers.obc),
    "oBERT, recalibrated": obert,
    "fastsal, blocks alone": partial(prune, reconstruct=False, recalibrate=False),
    "fastsal, recalibrated": partial(prune, reconstruct=False),
    "fastsal": prune,
    "fastsal, 8 rounds": partial(prune, rounds=8),
    "magnitude, recalibrated and refitted": partial(magnitude, recalibrated=True, refitted=True),
    "SparseGPT, recalibrated and refitted": partial(peer, rule=peers.sparse_gpt, refitted=True),
    "fastsal, refitted": partial(prune, refit=fastsal.Refit(steps=REFIT_STEPS)),
    "fastsal, 4 rounds, refitted between": partial(
        prune, rounds=4, refit=fastsal.Refit(steps=REFIT_STEPS, between_rounds=True)
    ),
}
