"""Scores of a model's weights by a named criterion."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastsal.errors import InvalidArgument, PrecisionWarning
from fastsal.fisher.block_fisher import BlockFisher
from fastsal.fisher.checks import check_damping
from fastsal.fisher.parts import Parts, slices, uncut
from fastsal.fisher.statistics import Statistics, statistics_of
from fastsal.gradients import select_parameters
from fastsal.models.selection import check_mask_shapes, model_parameters
from fastsal.pruning.criteria.registry import CRITERIA, Criterion, Inputs
from fastsal.pruning.masks.masks import Masks
from fastsal.utils.warn import warn_user

_TOLERANCE = 0.01


def score(
    model: nn.Module,
    fisher: BlockFisher | Statistics | None,
    criterion: str = "block-fisher",
    damping: float = 1e-5,
    *,
    masks: Masks | None = None,
    parameters: str | Sequence[str] | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Score every weight: the loss expected from removing it, low = prune first.

    Args:
        model: The model that the statistics were collected on.
        fisher: Statistics from `collect`; None is enough for `"magnitude"` and `"random"`.
        criterion: One of `CRITERIA`: `"magnitude"`, `"random"`, `"taylor"`, `"diag-fisher"`,
            `"block-fisher"`, `"obs-greedy"`.
        damping: `λ`, above zero; `A = F + λI`. Criteria without an inverse ignore it.
        masks: Weights already pruned, which take no further part; they score `-inf`.
        parameters: Names or patterns, where there are no statistics to take them from.
        seed: Seed of `"random"`.

    Returns:
        Name to scores, float32, of the parameter's shape, on the CPU.

    Raises:
        InvalidArgument: Unknown criterion, bad damping, statistics missing.
        UnknownParameter: The statistics are of another model.
        MaskError: A mask has another shape than its parameter.
        FactorizationError: A damped block is not positive definite; names parameter and blocks.

    Warns:
        PrecisionWarning: The error bound of scores passes one per cent; names the parameter.
    """
    entry = CRITERIA[find_criterion(criterion)]
    if entry.needs_damping:
        damping = check_damping(damping)
    if entry.needs_fisher and fisher is None:
        raise InvalidArgument(f"fisher: is None; {criterion!r} needs statistics from collect")
    statistics = None if fisher is None else statistics_of(fisher)
    chosen = _chosen(model, statistics, parameters)
    kept = {name: masks[name] for name in chosen if name in masks} if masks is not None else {}
    check_mask_shapes("masks", kept, chosen)
    return score_tensors(chosen, statistics, entry, damping, kept, seed)


def score_tensors(
    tensors: Mapping[str, Tensor],
    statistics: Statistics | None,
    entry: Criterion,
    damping: float,
    kept: Mapping[str, Tensor],
    seed: int,
) -> dict[str, Tensor]:
    """Score weights by the names of the statistics, of a whole model or some parts of it."""
    generator = torch.Generator().manual_seed(seed)
    errors: dict[str, NDArray[np.float64]] = {}
    scores = {name: torch.empty(p.shape) for name, p in tensors.items()}
    for fisher, parts in _groups(tensors, statistics if entry.needs_fisher else None):
        weights = {key: _double(key, w) for key, w in slices(tensors, parts).items()}
        some = slices(kept, parts) or None
        inputs = Inputs(weights, fisher, damping, some, generator, errors)
        for key, values in entry.compute(inputs).items():
            parts[key].of(scores[parts[key].name]).copy_(values.reshape(-1))
        del fisher, weights, inputs  # before sums of the next parts are made
    if statistics is not None:
        warn_imprecise(errors, statistics.precision, damping)
    for name, mask in kept.items():
        scores[name].masked_fill_(~mask, -math.inf)
    return scores


def find_criterion(criterion: str) -> str:
    """Return the criterion's name, or raise InvalidArgument with those that there are."""
    if criterion in CRITERIA:
        return criterion
    close = difflib.get_close_matches(str(criterion), CRITERIA, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    raise InvalidArgument(
        f"criterion: got {criterion!r}{hint}; takes {', '.join(map(repr, CRITERIA))}"
    )


def warn_imprecise(
    errors: Mapping[str, NDArray[np.float64]], precision: str, damping: float
) -> None:
    """Warn where the error bound of scores, name to `[n_blocks]`, passes one per cent."""
    worst = {name: float(bounds.max(initial=0.0)) for name, bounds in errors.items()}
    doubtful = {name: error for name, error in worst.items() if error > _TOLERANCE}
    if doubtful:
        name = max(doubtful, key=lambda n: doubtful[n])
        blocks = int((errors[name] > _TOLERANCE).sum())
        others = f" and {len(doubtful) - 1} other parameters" if len(doubtful) > 1 else ""
        warn_user(
            f"scores of {name!r}{others}: rounding of the {precision} sums may "
            f"change them by up to {min(doubtful[name], 1):.0%} ({blocks} of its blocks pass 1 %) "
            f"at damping {damping:g}; collect with precision='float64' or damp more",
            PrecisionWarning,
        )


def _groups(
    chosen: Mapping[str, Tensor], statistics: Statistics | None
) -> Iterator[tuple[BlockFisher | None, Parts]]:
    """What is scored at a time: a group of parts with its statistics, or a parameter without."""
    if statistics is not None:
        yield from statistics.groups()
        return
    for part in uncut({name: p.shape for name, p in chosen.items()}):
        yield None, {part.key: part}


def _chosen(
    model: nn.Module, statistics: Statistics | None, parameters: str | Sequence[str] | None
) -> dict[str, nn.Parameter]:
    if statistics is None:
        return select_parameters(model, parameters)
    if parameters is not None:
        raise InvalidArgument("parameters: are those of the statistics; leave it out")
    return model_parameters(model, statistics.shapes)


def _double(name: str, weights: Tensor) -> Tensor:
    w = weights.detach().cpu().double()
    if not bool(torch.isfinite(w).all()):
        raise InvalidArgument(f"model: parameter {name!r} holds NaN or infinity")
    return w
