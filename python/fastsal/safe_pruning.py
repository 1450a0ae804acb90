"""Prune to the highest sparsity that keeps a limit on held-out images (see `fastsal.safety`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastsal.compensation import compensate
from fastsal.criteria import score
from fastsal.damping import outputs
from fastsal.errors import DataError, InvalidArgument
from fastsal.masks import Masks
from fastsal.ranking import rank
from fastsal.safety import (
    GRID,
    LOOK_AHEAD,
    Limit,
    SafetyReport,
    differences,
    is_below,
    loss_cap,
    losses_of,
    trusted_until,
    upper_bound,
)

if TYPE_CHECKING:
    from fastsal.fisher import BlockFisher

LossFunction = Callable[[Tensor, Tensor], Tensor]


class Examination:
    """The dense model's answers on the test images, and how far a pruned one is from them."""

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[tuple[Tensor, Tensor | None]],
        limit: Limit,
        loss: LossFunction,
    ) -> None:
        self.limit = limit
        self._loss = loss
        self._batches: list[tuple[Tensor, Tensor]] = []
        for images, labels in batches:
            if labels is None:
                raise DataError("labels: are missing; a limit is tested on labelled images")
            self._batches.append((images, labels))
        if not self._batches:
            raise InvalidArgument("samples: none are left to test the limit on; takes more")
        self._dense = [outputs(model, images).cpu() for images, _ in self._batches]
        self.images = sum(len(out) for out in self._dense)
        self.cap = loss_cap(self._dense[0]) if limit.kind == "loss" else None

    def __call__(self, model: nn.Module) -> dict[str, Any]:
        """Measure a pruned model."""
        increases, rises = [], []
        for (images, labels), dense in zip(self._batches, self._dense, strict=True):
            out, target = outputs(model, images).cpu(), labels.cpu()
            both = losses_of(self._loss, dense, target), losses_of(self._loss, out, target)
            values, low, high = differences(self.limit, dense, out, both, target)
            increases.append(values)
            rises.append((both[1] - both[0]).double())
        each, rise = torch.cat(increases), torch.cat(rises)
        confidence = self.limit.confidence
        return {
            "increase": float(each.mean()),
            "upper": upper_bound(each.numpy(), low, high, confidence),
            "keeps": is_below(each.numpy(), self.limit.most, low, high, confidence),
            "loss_increase": float(rise.mean()),
            "loss_error": float(rise.std(correction=0)) / len(rise) ** 0.5,
        }


def search(
    model: nn.Module,
    fisher: BlockFisher | None,
    examination: Examination,
    *,
    criterion: str,
    damping: float,
    compensates: bool,
    ranking: Mapping[str, Any],
    chosen: Mapping[str, nn.Parameter],
    seed: int,
) -> tuple[Masks, dict[str, Tensor], float | None, SafetyReport]:
    """Test sparsities in rising order; the model ends pruned to the last that kept the limit.

    Returns:
        Masks, scores, the predicted loss increase, and what was tested.
    """
    start = {name: p.detach().clone() for name, p in chosen.items()}
    names = None if fisher is not None else list(chosen)
    scores = score(model, fisher, criterion, damping, parameters=names, seed=seed)

    def prune_to(sparsity: float) -> tuple[Masks, float | None]:
        restore(chosen, start)
        masks = rank(scores, sparsity, **ranking)
        predicted = None
        if compensates and fisher is not None:
            predicted = compensate(model, fisher, masks, damping).total
        masks.apply(model)
        return masks, predicted

    curve: list[dict[str, Any]] = []
    safe, is_open, left = 0.0, True, LOOK_AHEAD
    for sparsity in GRID:
        try:
            _, predicted = prune_to(sparsity)
        except InvalidArgument:
            break  # the floor leaves no more to prune
        point = {"sparsity": sparsity, "predicted": predicted, **examination(model)}
        curve.append(point)
        is_open = is_open and point["keeps"]
        if is_open:
            safe = sparsity
        else:
            left -= 1
            if left == 0:
                break
    masks, predicted = prune_to(safe)
    report = SafetyReport(
        examination.limit, safe, examination.images, examination.cap, curve, trusted_until(curve)
    )
    return masks, scores, predicted, report


def restore(parameters: Mapping[str, nn.Parameter], weights: Mapping[str, Tensor]) -> None:
    """Copy weights back."""
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(weights[name])
