"""The rows of the table: ways to prune a model with unlabeled images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

import fastsal
from benches.quality import peers
from fastsal.pruning.damping import resolve_damping
from fastsal.pruning.recalibration import recalibrate

Batches = list[tuple[torch.Tensor, None]]
Goal = float | str  # sparsity, or pattern
Method = Callable[[nn.Module, Batches, Goal], None]

REFIT = fastsal.Refit()  # the same for all


def _ranking(goal: Goal) -> dict[str, Any]:
    return {"pattern": goal} if isinstance(goal, str) else {"sparsity": goal}


def magnitude(
    model: nn.Module,
    batches: Batches,
    goal: Goal,
    *,
    recalibrated: bool = False,
    reconstructed: bool = False,
    refit: fastsal.Refit | None = None,
) -> None:
    """Prune the smallest weights of the whole model, or of each group."""
    dense = deepcopy(model)
    masks = fastsal.rank(fastsal.score(model, None, "magnitude"), **_ranking(goal))
    masks.apply(model)
    if reconstructed:
        fastsal.reconstruct(model, dense, batches, masks)
    if recalibrated:
        recalibrate(model, batches)
    if refit is not None:
        fastsal.refit(model, dense, batches, masks, refit)


def obert(
    model: nn.Module, batches: Batches, goal: Goal, *, refit: fastsal.Refit | None = None
) -> None:
    """Block-fisher scores and the update that treats pruned weights independently."""
    dense = deepcopy(model)
    fisher = fastsal.collect(model, batches, curvature="features")
    damping = resolve_damping("0.1x", fisher)
    scores = fastsal.score(model, fisher, "block-fisher", damping)
    masks = fastsal.rank(scores, **_ranking(goal))
    peers.independent_update(model, fisher, masks, damping)
    recalibrate(model, batches)
    if refit is not None:
        fastsal.refit(model, dense, batches, masks, refit)


def peer(
    model: nn.Module,
    batches: Batches,
    goal: Goal,
    *,
    rule: peers.Rule,
    refit: fastsal.Refit | None = None,
    **options: bool,
) -> None:
    """One of the peers that prune layer by layer; batch normalization is recalibrated."""
    dense = deepcopy(model)
    images = torch.cat([x for x, _ in batches])
    wanted: peers.Goal = goal if isinstance(goal, float) else _n_of_m(goal)
    masks = peers.layer_by_layer(model, images, rule, wanted, **options)
    recalibrate(model, batches)
    if refit is not None:
        fastsal.refit(model, dense, batches, masks, refit)


def _n_of_m(pattern: str) -> tuple[int, int]:
    n, m = map(int, pattern.split(":"))
    return n, m


def prune(model: nn.Module, batches: Batches, goal: Goal, **options: Any) -> None:
    """`fastsal.prune` with features."""
    result = fastsal.prune(model, batches, curvature="features", **_ranking(goal), **options)
    result.masks.verify(model)


def prune_and_train(
    model: nn.Module, batches: Batches, goal: Goal, *, rounds: int, steps: int
) -> None:
    """`fastsal.prune` with features, and a longer refitting in the end."""
    dense = deepcopy(model)
    options = {"rounds": rounds, "refit": replace(REFIT, between_rounds=True)}
    result = fastsal.prune(model, batches, curvature="features", **_ranking(goal), **options)
    longer = replace(REFIT, steps=steps, batch_size=64)
    fastsal.refit(model, dense, batches, result.masks, longer)
    result.masks.verify(model)


METHODS: Mapping[str, Method] = {
    "magnitude": magnitude,
    "magnitude, recalibrated": partial(magnitude, recalibrated=True),
    "magnitude, reconstructed": partial(magnitude, reconstructed=True),
    "Wanda, recalibrated": partial(peer, rule=peers.wanda),
    "SparseGPT, recalibrated": partial(peer, rule=peers.sparse_gpt),
    "OBC on Σxxᵀ, recalibrated": partial(peer, rule=peers.obc, is_sequential=False),
    "SparseGPT with magnitude's shares, recalibrated": partial(
        peer, rule=peers.sparse_gpt, has_shares=True
    ),
    "oBERT, recalibrated": obert,
    "fastsal, blocks alone": partial(prune, reconstruct=False, recalibrate=False),
    "fastsal, recalibrated": partial(prune, reconstruct=False),
    "fastsal": prune,
    "fastsal, 8 rounds": partial(prune, rounds=8),
    "magnitude, recalibrated and refitted": partial(magnitude, recalibrated=True, refit=REFIT),
    "Wanda, recalibrated and refitted": partial(peer, rule=peers.wanda, refit=REFIT),
    "SparseGPT, recalibrated and refitted": partial(peer, rule=peers.sparse_gpt, refit=REFIT),
    "OBC on Σxxᵀ, recalibrated and refitted": partial(
        peer, rule=peers.obc, is_sequential=False, refit=REFIT
    ),
    "oBERT, recalibrated and refitted": partial(obert, refit=REFIT),
    "fastsal, refitted": partial(prune, refit=REFIT),
    "fastsal, 8 rounds, refitted": partial(prune, rounds=8, refit=REFIT),
    "fastsal, 8 rounds, refitted between": partial(
        prune, rounds=8, refit=replace(REFIT, between_rounds=True)
    ),
    "fastsal, 8 rounds, refitted between and 900 steps": partial(
        prune_and_train, rounds=8, steps=900
    ),
    "fastsal, 8 rounds, refitted between and 2,400 steps": partial(
        prune_and_train, rounds=8, steps=2400
    ),
    "fastsal, 16 rounds, refitted between and 3,000 steps": partial(
        prune_and_train, rounds=16, steps=3000
    ),
}
