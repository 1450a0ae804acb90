"""Other ways to prune, written from their papers, for comparison only.

- Wanda (Sun et al., ICLR 2024, eq. 1): `|W_ij| ‖x_j‖₂`, compared within each output row.
- SparseGPT (Frantar and Alistarh, ICML 2023, algorithm 1): columns from left to right, those of the
  least `w² / [H⁻¹]_jj` of each 128 are pruned, and the columns to the right make up for them.
- OBC (Frantar et al., NeurIPS 2022, algorithm 1): exact elimination of one weight at a time with
  `H = Σ x xᵀ` of all inputs of a row.

All three prune every layer to the same sparsity, one after the other, with the inputs that a layer
has in the model whose earlier layers are pruned already.

Axes: R rows of inputs, O outputs, d inputs of a row, G groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

import fastsal
from fastsal.gradients.capture import Interception
from fastsal.gradients.rules.operations import Call, Operation
from fastsal.gradients.rules.windows import InputRows

ROWS = 2**16
PERCENT_DAMPING = 0.01  # SparseGPT's and OBC's: of the mean diagonal of H

# (weights [O, d], second moments of the inputs [d, d], fraction to prune or pattern) -> new weights
Rule = Callable[[Tensor, Tensor, float | tuple[int, int]], Tensor]


def wanda(weight: Tensor, moments: Tensor, goal: float | tuple[int, int]) -> Tensor:
    """Prune the weights of the least `|w| ‖x‖` of each row, or of each group."""
    scores = weight.abs() * moments.diagonal().clamp(min=0).sqrt()
    return torch.where(_kept(scores, goal), weight, 0.0)


def sparse_gpt(
    weight: Tensor, moments: Tensor, goal: float | tuple[int, int], block: int = 128
) -> Tensor:
    """Sweep over the columns; see the module."""
    weight = weight.clone()
    d = weight.shape[1]
    dead = moments.diagonal() == 0
    weight[:, dead] = 0
    damped = moments + torch.diag(dead.to(moments.dtype))
    damped.diagonal().add_(PERCENT_DAMPING * moments.diagonal().mean())
    inverse = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    for start in range(0, d, block):
        stop = min(start + block, d)
        errors = torch.zeros(len(weight), stop - start, dtype=weight.dtype)
        kept = torch.ones(len(weight), stop - start, dtype=torch.bool)
        if isinstance(goal, float):
            scores = (weight[:, start:stop] / inverse.diagonal()[start:stop]) ** 2
            count = round(goal * scores.numel())
            kept = torch.ones(scores.numel(), dtype=torch.bool)
            kept[scores.flatten().argsort()[:count]] = False
            kept = kept.reshape(scores.shape)
        for j in range(start, stop):
            if isinstance(goal, tuple) and j % goal[1] == 0 and j + goal[1] <= d:
                span = slice(j, j + goal[1])
                scores = (weight[:, span] / inverse.diagonal()[span]) ** 2
                kept[:, j - start : j - start + goal[1]] = _kept(scores, goal)
            old = weight[:, j].clone()
            weight[:, j] = torch.where(kept[:, j - start], old, 0.0)
            errors[:, j - start] = (old - weight[:, j]) / inverse[j, j]
            weight[:, j + 1 : stop] -= errors[:, j - start, None] * inverse[j, j + 1 : stop]
        weight[:, stop:] -= errors @ inverse[start:stop, stop:]
    return weight


def obc(weight: Tensor, moments: Tensor, goal: float | tuple[int, int]) -> Tensor:
    """Eliminate the weights of each row one at a time, then cut all rows by one threshold."""
    if not isinstance(goal, float):
        raise NotImplementedError("obc is compared without patterns")
    outputs, d = weight.shape
    damped = moments.clone()
    damped.diagonal().add_(PERCENT_DAMPING * moments.diagonal().mean() + 1e-30)
    start = torch.linalg.inv(damped)
    costs = torch.zeros(outputs, d, dtype=weight.dtype)
    order = torch.zeros(outputs, d, dtype=torch.int64)
    for o in range(outputs):
        w, inverse = weight[o].clone(), start.clone()
        gone = torch.zeros(d, dtype=torch.bool)
        for step in range(d):
            score = w**2 / inverse.diagonal()
            score[gone] = math.inf
            j = int(score.argmin())
            costs[o, step], order[o, step] = score[j], j
            w -= inverse[:, j] * (w[j] / inverse[j, j])
            inverse -= torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
            gone[j] = True
            inverse[j, j] = 1.0
            w[j] = 0
    # A row is cut at a prefix of its order: the least total cost is that of the least costs.
    running = costs.cummax(1).values
    cut = running.flatten().sort().values[round(goal * running.numel()) - 1] if goal else -math.inf
    found = weight.clone()
    for o in range(outputs):
        pruned = order[o, : int((running[o] <= cut).sum())]
        kept = torch.ones(d, dtype=torch.bool)
        kept[pruned] = False
        at = kept.nonzero()[:, 0]
        found[o] = 0
        found[o, at] = torch.linalg.solve(damped[at][:, at], damped[at] @ weight[o])
    return found


def _kept(scores: Tensor, goal: float | tuple[int, int]) -> Tensor:
    """Keep the largest scores of each row, or the n largest of every m."""
    rows = scores
    if isinstance(goal, tuple):
        whole = scores.shape[1] // goal[1] * goal[1]
        rows = scores[:, :whole].reshape(-1, goal[1])
        count = goal[1] - goal[0]
    else:
        count = round(goal * scores.shape[1])
    kept = torch.ones_like(rows, dtype=torch.bool)
    kept.scatter_(1, rows.argsort(1)[:, :count], value=False)
    if not isinstance(goal, tuple):
        return kept
    every = torch.ones_like(scores, dtype=torch.bool)
    every[:, :whole] = kept.reshape(len(scores), whole)
    return every


class _Sweep(Interception):
    """Prunes each layer just before it runs."""

    def __init__(self, tracked: Mapping[str, Tensor], rule: Rule, goals: Mapping[str, float]):
        super().__init__(tracked)
        self._tracked, self._rule, self._goals = tracked, rule, goals
        self.masks: dict[str, Tensor] = {}

    def around(
        self, name: str, operation: Operation, call: Call, run: Callable[[], Tensor]
    ) -> Tensor:
        """Prune a layer, then run it."""
        del operation
        output = run()
        if name in self.masks:
            return output
        weight = self._tracked[name]
        total = output.numel() // len(weight)
        places = torch.randperm(total, generator=torch.Generator().manual_seed(0))[:ROWS]
        x = InputRows(call, output.shape).at(places).transpose(0, 1).double()
        moments = x.transpose(1, 2) @ x / len(places)
        wide = weight.detach().double().reshape(call.groups, -1, x.shape[2])
        goal = self._goals[name]
        new = torch.stack([self._rule(w, h, goal) for w, h in zip(wide, moments, strict=True)])
        self.masks[name] = (new != 0).reshape(weight.shape)
        weight.copy_(new.reshape(weight.shape))
        return run()


def layer_by_layer(
    model: nn.Module, images: Tensor, rule: Rule, goal: float | tuple[int, int]
) -> fastsal.Masks:
    """Prune every layer in place, in one forward pass; returns the masks."""
    weights = fastsal.select_parameters(model)
    # As in `prune` with features: the classifier is left.
    weights = {n: p for n, p in weights.items() if p is not _classifier(model, images[:2])}
    sweep = _Sweep(weights, rule, dict.fromkeys(weights, goal))
    with torch.no_grad(), sweep:
        model(images)
    return fastsal.Masks(sweep.masks)


def _classifier(model: nn.Module, images: Tensor) -> Tensor | None:
    from fastsal.models.classifier import classifier_of

    return next((p for layer in classifier_of(model, images) for p in layer.parameters()), None)


def independent_update(
    model: nn.Module, fisher: fastsal.BlockFisher, masks: fastsal.Masks, damping: float
) -> None:
    """Apply the update of WoodFisher and oBERT, which treats pruned weights independently."""
    parameters = dict(model.named_parameters())
    for name in fisher.names:
        blocks = fisher.blocks(name)
        size = blocks.shape[1]
        inverse = torch.linalg.inv(blocks + damping * torch.eye(size, dtype=torch.float64))
        w = parameters[name].detach().reshape(-1).double()
        pad = len(blocks) * size - w.numel()
        padded = nn.functional.pad(w, (0, pad)).reshape(-1, size)
        gone = nn.functional.pad(~masks[name].reshape(-1), (0, pad)).reshape(-1, size)
        step = padded * gone / inverse.diagonal(dim1=1, dim2=2)
        moved = padded - torch.einsum("bij,bj->bi", inverse, step)
        with torch.no_grad():
            parameters[name].copy_(moved.reshape(-1)[: w.numel()].reshape(parameters[name].shape))
    masks.apply(model)
