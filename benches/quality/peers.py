"""Other ways to prune, written from their papers, for comparison only.

- Wanda (Sun et al., ICLR 2024, eq. 1): `|W_ij| ‖x_j‖₂`, compared within each output row.
- SparseGPT (Frantar and Alistarh, ICML 2023, algorithm 1): columns from left to right, those of the
  least `w² / [H⁻¹]_jj` of each 128 are pruned, and the columns to the right make up for them.
- OBC (Frantar et al., NeurIPS 2022, algorithm 1): exact elimination of one weight at a time with
  `H = Σ x xᵀ` of all inputs of a row.

Wanda and SparseGPT prune one layer after the other, with the inputs that a layer has in the model
whose earlier layers are pruned already; OBC has the dense model's. Every layer is pruned to the
same sparsity, as published; with `has_shares` as one threshold of magnitudes would.

Axes: R rows of inputs, O outputs, d inputs of a row, G groups.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

import fastsal
import fastsal._core as _core
from fastsal.gradients.capture import Interception
from fastsal.gradients.rules.operations import Call, Operation
from fastsal.gradients.rules.windows import InputRows
from fastsal.models.evaluating import to_model

ROWS = 2**16
PERCENT_DAMPING = 0.01  # SparseGPT's and OBC's: of the mean diagonal of H

BYTES = 2**29  # of moments that are eliminated in one call

Goal = float | tuple[int, int]  # the fraction to prune, or n kept of every m
Trace = tuple[Tensor, Tensor]
_traces: dict[bytes, Trace] = {}

# (weights [O, d], second moments of the inputs [d, d], fraction to prune or pattern) -> new weights
Rule = Callable[[Tensor, Tensor, Goal], Tensor]


def wanda(weight: Tensor, moments: Tensor, goal: Goal) -> Tensor:
    """Prune the weights of the least `|w| ‖x‖` of each row, or of each group."""
    scores = weight.abs() * moments.diagonal().clamp(min=0).sqrt()
    return torch.where(_kept(scores, goal), weight, 0.0)


def sparse_gpt(weight: Tensor, moments: Tensor, goal: Goal, block: int = 128) -> Tensor:
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
        errors = torch.zeros_like(weight[:, start:stop])
        kept = torch.ones_like(errors, dtype=torch.bool)
        if isinstance(goal, float):
            scores = (weight[:, start:stop] / inverse.diagonal()[start:stop]) ** 2
            count = round(goal * scores.numel())
            kept = kept.flatten()
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


def obc(weight: Tensor, moments: Tensor, goal: Goal) -> Tensor:
    """Eliminate the weights of each row one at a time, then cut all rows by one threshold."""
    if not isinstance(goal, float):
        raise NotImplementedError("obc is compared without patterns")
    place, weight, moments = weight.device, weight.cpu(), moments.cpu()
    d = weight.shape[1]
    damping = float(PERCENT_DAMPING * moments.diagonal().mean()) + 1e-30
    damped = moments.clone()
    damped.diagonal().add_(damping)
    # A trace serves every goal.
    key = hashlib.sha256(weight.numpy().tobytes() + damped.numpy().tobytes()).digest()
    if key not in _traces:
        _traces[key] = _eliminated(weight, moments, damping)
    costs, order = _traces[key]
    # A row is cut at a prefix of its order: the least total cost is that of the least costs.
    by_turn = costs.gather(1, order)
    cut = by_turn.flatten().sort().values[round(goal * costs.numel()) - 1] if goal else -math.inf
    found = torch.zeros_like(weight)
    for o, count in enumerate((by_turn <= cut).sum(1).tolist()):
        at = order[o, count:].sort().values
        if len(at) == d:
            found[o] = weight[o]
        elif len(at):
            found[o, at] = torch.linalg.solve(damped[at][:, at], damped[at] @ weight[o])
    return found.to(place)


def _eliminated(weight: Tensor, moments: Tensor, damping: float) -> Trace:
    """Return the scores `[O, d]`, and the columns of each row in the order of elimination."""
    d = weight.shape[1]
    rows, columns = torch.triu_indices(d, d)
    triangle = moments[rows, columns].numpy()
    most = max(1, BYTES // triangle.nbytes)
    costs, order = [], []
    for some in weight.float().split(most):
        sums = (np.tile(triangle, len(some)), some.numel(), 1.0, None)
        ((scores, turns, failed, _),) = _core.eliminate(
            [sums], [some.flatten().numpy()], d, damping
        )
        if failed:
            raise ArithmeticError(f"{len(failed)} rows cannot be eliminated")
        costs.append(torch.from_numpy(scores).reshape(len(some), d))
        order.append(torch.from_numpy(turns.astype(np.int64)).reshape(len(some), d).argsort(1))
    return torch.cat(costs), torch.cat(order)


def _kept(scores: Tensor, goal: Goal) -> Tensor:
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
    """Prunes each layer: just before it runs, or all of them at the end."""

    def __init__(
        self,
        tracked: Mapping[str, Tensor],
        rule: Rule,
        goals: Mapping[str, Goal],
        *,
        is_sequential: bool,
    ) -> None:
        super().__init__(tracked)
        self._tracked, self._rule, self._goals = tracked, rule, goals
        self._is_sequential = is_sequential
        self.found: dict[str, Tensor] = {}

    def around(
        self, name: str, operation: Operation, call: Call, run: Callable[[], Tensor]
    ) -> Tensor:
        """Prune a layer, then run it."""
        del operation
        output = run()
        if name in self.found:
            return output
        weight = self._tracked[name]
        total = output.numel() // len(weight)
        places = torch.randperm(total, generator=torch.Generator().manual_seed(0))[:ROWS]
        places = places.to(output.device)
        x = InputRows(call, output.shape).at(places).transpose(0, 1).double()
        moments = x.transpose(1, 2) @ x / len(places)
        wide = weight.detach().double().reshape(call.groups, -1, x.shape[2])
        goal = self._goals[name]
        new = torch.stack([self._rule(w, h, goal) for w, h in zip(wide, moments, strict=True)])
        self.found[name] = new.reshape(weight.shape).to(weight.dtype)
        if not self._is_sequential:
            return output
        weight.copy_(self.found[name])
        return run()


def layer_by_layer(
    model: nn.Module,
    images: Tensor,
    rule: Rule,
    goal: Goal,
    *,
    is_sequential: bool = True,
    has_shares: bool = False,
) -> fastsal.Masks:
    """Prune every layer in place, in one forward pass.

    Args:
        model: The dense model.
        images: Calibration images `[n, ...]`, on any device.
        rule: Prunes the weights of one layer.
        goal: Fraction to prune, or pattern.
        is_sequential: Whether the inputs of a layer come from pruned layers.
        has_shares: Whether each layer has the sparsity that one threshold of magnitudes gives it,
            in place of the same one.

    Returns:
        The masks.
    """
    # As in `prune` with features: the classifier is left.
    images = to_model(images, model)
    left = _classifier(model, images[:2])
    weights = {n: p for n, p in fastsal.select_parameters(model).items() if p is not left}
    goals: dict[str, Goal] = dict.fromkeys(weights, goal)
    if has_shares and isinstance(goal, float):
        masks = fastsal.rank({n: w.detach().square() for n, w in weights.items()}, goal)
        goals = {n: float((~masks[n]).double().mean()) for n in weights}
    sweep = _Sweep(weights, rule, goals, is_sequential=is_sequential)
    with torch.no_grad(), sweep:
        model(images)
    with torch.no_grad():
        for name, new in sweep.found.items():
            weights[name].copy_(new)
    return fastsal.Masks({name: new != 0 for name, new in sweep.found.items()})


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
        w = parameters[name].detach().cpu().reshape(-1).double()
        pad = len(blocks) * size - w.numel()
        padded = nn.functional.pad(w, (0, pad)).reshape(-1, size)
        gone = nn.functional.pad(~masks[name].cpu().reshape(-1), (0, pad)).reshape(-1, size)
        step = padded * gone / inverse.diagonal(dim1=1, dim2=2)
        moved = padded - torch.einsum("bij,bj->bi", inverse, step)
        with torch.no_grad():
            parameters[name].copy_(moved.reshape(-1)[: w.numel()].reshape(parameters[name].shape))
    masks.apply(model)
