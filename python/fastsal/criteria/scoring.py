"""Scores of a model's weights by a named criterion."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fastsal.criteria.registry import CRITERIA, Inputs
from fastsal.errors import InvalidArgument, MaskError, UnknownParameter
from fastsal.fisher import BlockFisher, check_damping
from fastsal.gradients import select_parameters
from fastsal.masks import Masks


def score(
    model: nn.Module,
    fisher: BlockFisher | None,
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
    chosen = find_criterion(criterion)
    entry = CRITERIA[chosen]
    if entry.needs_damping:
        check_damping(damping)
    if entry.needs_fisher and fisher is None:
        raise InvalidArgument(f"fisher: is None; {criterion!r} needs statistics from collect")
    weights = _weights(model, fisher, parameters)
    kept = None if masks is None else {name: masks[name] for name in weights if name in masks}
    check_mask_shapes("masks", kept or {}, weights)
    inputs = Inputs(weights, fisher, damping, kept, seed)
    scores = entry.compute(inputs)
    result = {}
    for name, values in scores.items():
        single = values.to(torch.float32)
        if kept is not None and name in kept:
            single = single.masked_fill(~kept[name], -math.inf)
        result[name] = single.contiguous()
    return result


def find_criterion(criterion: str) -> str:
    """Return the criterion's name, or raise InvalidArgument with those that there are."""
    if criterion in CRITERIA:
        return criterion
    close = difflib.get_close_matches(str(criterion), CRITERIA, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    raise InvalidArgument(
        f"criterion: got {criterion!r}{hint}; takes {', '.join(map(repr, CRITERIA))}"
    )


def model_parameters(
    model: nn.Module, shapes: Mapping[str, Sequence[int]]
) -> dict[str, nn.Parameter]:
    """Return the model's parameters of these names.

    Raises:
        UnknownParameter: The model lacks one of them, or has it in another shape.
    """
    owned = dict(model.named_parameters(remove_duplicate=False))
    for name, shape in shapes.items():
        if name not in owned:
            raise UnknownParameter(
                f"model: has no parameter {name!r}; takes the model that it was made for"
            )
        if tuple(owned[name].shape) != tuple(shape):
            raise UnknownParameter(
                f"model: parameter {name!r} has shape {tuple(owned[name].shape)}; "
                f"takes the model that it was made for, {tuple(shape)}"
            )
    return {name: owned[name] for name in shapes}


def check_mask_shapes(
    argument: str, masks: Mapping[str, Tensor], parameters: Mapping[str, Tensor]
) -> None:
    """Raise MaskError for a mask of another shape than its parameter."""
    for name, mask in masks.items():
        if name in parameters and mask.shape != parameters[name].shape:
            raise MaskError(
                f"{argument}: {name!r} has shape {tuple(mask.shape)}; "
                f"takes {tuple(parameters[name].shape)}"
            )


def _weights(
    model: nn.Module, fisher: BlockFisher | None, parameters: str | Sequence[str] | None
) -> dict[str, Tensor]:
    if fisher is None:
        chosen = select_parameters(model, parameters)
    else:
        if parameters is not None:
            raise InvalidArgument("parameters: are those of the statistics; leave it out")
        chosen = model_parameters(model, fisher.shapes)
    weights = {}
    for name, p in chosen.items():
        w = p.detach().cpu().double()
        if not bool(torch.isfinite(w).all()):
            raise InvalidArgument(f"model: parameter {name!r} holds NaN or infinity")
        weights[name] = w
    return weights
