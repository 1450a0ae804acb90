"""Score a model's weights by a named criterion."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastsal.errors import DataError, InvalidArgument, PrecisionWarning
from fastsal.fisher.block_fisher import BlockFisher
from fastsal.fisher.parts import Parts, slices, uncut
from fastsal.fisher.statistics import Statistics, statistics_of
from fastsal.gradients import select_parameters
from fastsal.models.input_axis import WithAxes, known_axes
from fastsal.models.selection import check_finite_weights, check_mask_shapes, model_parameters
from fastsal.models.wrappers import with_names_of
from fastsal.pruning.criteria.registry import CRITERIA, Criterion, Inputs
from fastsal.pruning.damping import resolve_damping
from fastsal.pruning.shelf import Shelf
from fastsal.utils.booleans import boolean
from fastsal.utils.choices import CriterionName
from fastsal.utils.numbers import SEEDS, whole
from fastsal.utils.plain_text import counted
from fastsal.utils.suggestions import check_choice
from fastsal.utils.warn import warn_user

# Relative error bound of a score from which on a warning is issued.
_TOLERANCE = 0.01


def score(
    model: nn.Module,
    fisher: BlockFisher | Statistics | None,
    criterion: CriterionName = "block-fisher",
    damping: float | str = "0.1x",
    *,
    masks: Mapping[str, Tensor] | None = None,
    parameters: str | Sequence[str] | None = None,
    seed: int = 0,
) -> WithAxes:
    """Score every weight by a criterion: the loss increase expected from removing it.

    Weights with low scores are pruned first; `fastsal.rank` turns scores into masks.

    Args:
        model: The model that the statistics were collected on, with the same weights.
        fisher: Statistics from `fastsal.collect`; None is valid for `"magnitude"` and `"random"`.
        criterion: With `θ` the weights, `F` the Fisher and `A = F + λI`:

            - `"magnitude"`: `θ_j² / 2`.
            - `"random"`: uniform random numbers, a control.
            - `"taylor"`: `|θ_j · mean gradient_j|` (SNIP, Lee et al. 2019; Molchanov et al. 2017).
            - `"diag-fisher"`: `θ_j² F_jj / 2` (Optimal Brain Damage, LeCun et al. 1989).
            - `"block-fisher"`: `θ_j² / (2 [A⁻¹]_jj)` (Optimal Brain Surgeon, Hassibi & Stork 1993).
            - `"obs-greedy"`: the running maximum of the costs of removing one weight at a time from
              each block, with the other weights of the block updated in between.
        damping: `λ`, used by `"block-fisher"` and `"obs-greedy"`: a positive number, or a multiple
            of the mean diagonal of F such as `"0.1x"`.
        masks: Name to mask (True = kept) of weights that are already pruned. They are excluded from
            the statistics and score `-inf`.
        parameters: Names or patterns of the parameters to score, where `fisher` is None; None
            scores those that `fastsal.select_parameters` selects by default.
        seed: Seed of `"random"`.

    Returns:
        Name to scores, float32, of each parameter's shape, on the CPU. The dict also notes the
        input axes of the layers, for patterns of `fastsal.rank`.

    Raises:
        InvalidArgument: An argument is invalid, statistics are missing or hold no samples, or a
            weight is NaN or infinite.
        DataError: Scores or statistics are beyond the range of float32; names the parameter.
        UnknownParameter: The model lacks a parameter of the statistics, or has it in another shape.
        MaskError: A mask has another shape than its parameter.
        FactorizationError: A damped block is not positive definite; the message names the parameter
            and the blocks.

    Warns:
        PrecisionWarning: The error bound of scores exceeds one per cent; the message names the
            parameter.
    """
    entry = CRITERIA[find_criterion(criterion)]
    seed = whole("seed", seed, *SEEDS)
    if entry.needs_fisher and fisher is None:
        raise InvalidArgument(f"fisher must be statistics from collect for {criterion!r}, got None")
    statistics = None if fisher is None else statistics_of(fisher)
    chosen = _chosen(model, statistics, parameters)
    every = with_names_of(masks or {}, chosen)
    given = {name: every[name] for name in chosen if name in every}
    check_mask_shapes("masks", given, chosen)
    kept = {name: boolean(mask.detach().cpu()) for name, mask in given.items()}
    absolute = 1.0  # not used without an inverse
    if entry.needs_damping and statistics is not None:
        absolute = resolve_damping(damping, statistics)
    scores = score_tensors(chosen, statistics, entry, absolute, kept, seed)
    shapes = {name: tuple(p.shape) for name, p in chosen.items()}
    return WithAxes(scores, known_axes(model, shapes))


def score_tensors(
    tensors: Mapping[str, Tensor],
    statistics: Statistics | None,
    entry: Criterion,
    damping: float,
    kept: Mapping[str, Tensor],
    seed: int,
) -> dict[str, Tensor]:
    """Return the scores of tensors that are named as in the statistics.

    Args:
        tensors: Name to weights, of a whole model or of parts of it.
        statistics: Statistics of these; None for criteria that need none.
        entry: The criterion.
        damping: Absolute `λ`.
        kept: Name to mask, True = kept.
        seed: Seed of random numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    errors: dict[str, NDArray[np.float64]] = {}
    scores = Shelf().room("scores", {name: p.shape for name, p in tensors.items()})
    for fisher, parts in _groups(tensors, statistics if entry.needs_fisher else None):
        weights = {key: _double(key, w) for key, w in slices(tensors, parts).items()}
        some = slices(kept, parts) or None
        inputs = Inputs(weights, fisher, damping, some, generator, errors)
        for key, values in entry.compute(inputs).items():
            found = parts[key].of(scores[parts[key].name]).copy_(values.reshape(-1))
            _check_range(key, found, values.reshape(-1))
        del fisher, weights, inputs  # before sums of the next parts are made
    if statistics is not None:
        warn_imprecise(errors, statistics.precision, damping)
    for name, mask in kept.items():
        scores[name].masked_fill_(~mask, -math.inf)
    return scores


def find_criterion(criterion: str) -> str:
    """Return the name of a criterion.

    Raises:
        InvalidArgument: There is no such criterion; the message lists those that exist.
    """
    check_choice("criterion", criterion, CRITERIA)
    return criterion


def warn_imprecise(
    errors: Mapping[str, NDArray[np.float64]], precision: str, damping: float
) -> None:
    """Warn where the error bound of scores, name to `[n_blocks]`, exceeds one per cent."""
    worst = {name: float(bounds.max(initial=0.0)) for name, bounds in errors.items()}
    doubtful = {name: error for name, error in worst.items() if error > _TOLERANCE}
    if doubtful:
        name = max(doubtful, key=lambda n: doubtful[n])
        blocks = int((errors[name] > _TOLERANCE).sum())
        rest = len(doubtful) - 1
        others = f" and {counted(rest, 'other parameter')}" if rest else ""
        warn_user(
            f"scores of {name!r}{others} may be off by up to {min(doubtful[name], 1):.0%}, as sums "
            f"are rounded to {precision} (bound above 1 % in {counted(blocks, 'block')} of "
            f"{name!r} at damping {damping:g}); collect with precision='float64' or increase "
            "damping",
            PrecisionWarning,
        )


def _groups(
    chosen: Mapping[str, Tensor], statistics: Statistics | None
) -> Iterator[tuple[BlockFisher | None, Parts]]:
    """Yield what is scored at once: a group of parts with its statistics, or one parameter."""
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
        raise InvalidArgument("parameters must be None with fisher, which defines them")
    return model_parameters(model, statistics.shapes)


def _check_range(name: str, scores: Tensor, exact: Tensor) -> None:
    """Raise DataError if a score `[d]` that is finite in float64 overflows float32."""
    large = scores.isinf()
    if bool(large.any()) and bool((large & exact.isfinite()).any()):
        raise DataError(
            f"scores of {name!r} must fit float32, got {float(exact[large].max()):.2g}; scale the "
            "loss down, or the weights"
        )


def _double(name: str, weights: Tensor) -> Tensor:
    check_finite_weights({name: weights})
    return weights.detach().cpu().double()
