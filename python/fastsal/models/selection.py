"""Selection of parameters: the default, exact names, and patterns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastsal.errors import InvalidArgument, MaskError, UnknownParameter
from fastsal.utils.suggestions import did_you_mean
from fastsal.utils.warn import warn_user

_EMBEDDINGS = (nn.Embedding,)
_DEFAULT_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
# Inputs of `nn.MultiheadAttention`; its output is a `Linear`.
_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
_WILDCARDS = frozenset("*?[")


def select_parameters(
    model: nn.Module, parameters: str | Sequence[str] | None = None
) -> dict[str, nn.Parameter]:
    """Select parameters of a model by name.

    Args:
        model: Any module.
        parameters: None selects the weights of `nn.Linear` and `nn.ConvNd`, and the projections of
            `nn.MultiheadAttention`. Otherwise one or more
            exact names or `fnmatch` patterns; a leading `!` excludes. An exact name may be that of
            any parameter. A pattern is matched against the default weights first, then against the
            weights of `nn.Embedding`, then against all parameters, and selects from the first of
            these sets with a match: `"blocks.*"` excludes biases, and `"*.pos_embed"` works.
            Exclusions alone start from the default. The weight of an `nn.Embedding` that is also
            the weight of a `Linear`, as in a language model with tied weights, is a default weight;
            `"!wte.weight"` excludes it.

    Returns:
        Canonical name to parameter, in the order of `model.named_parameters()`.

    Raises:
        UnknownParameter: A name or a pattern matches nothing.
        InvalidArgument: The selection is empty, or a parameter is uninitialized or not real
            floating point.
    """
    canonical = dict(model.named_parameters())
    default = _default_names(model, canonical)
    if parameters is None:
        chosen = default
        if not chosen:
            raise InvalidArgument(
                "parameters must be given: the model has no weight of nn.Linear, nn.ConvNd or "
                "nn.MultiheadAttention"
            )
    else:
        patterns = [parameters] if isinstance(parameters, str) else list(parameters)
        chosen = _match(model, canonical, default, patterns)
        if not chosen:
            raise InvalidArgument(
                f"parameters must select at least one parameter, got {patterns!r}"
            )
    selected = {name: value for name, value in canonical.items() if name in chosen}
    for name, value in selected.items():
        if isinstance(value, nn.parameter.UninitializedParameter):
            raise InvalidArgument(
                f"parameters: {name!r} is an uninitialized lazy parameter; run the model on one "
                "batch first"
            )
        if not value.is_floating_point():
            raise InvalidArgument(
                f"parameters: {name!r} must be real floating point, got {value.dtype}"
            )
    return selected


def _default_names(model: nn.Module, canonical: dict[str, nn.Parameter]) -> set[str]:
    identities: set[int] = set()
    for prefix, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            owned = dict(module.named_parameters(recurse=False))
            identities |= {id(owned[name]) for name in _PROJECTIONS if name in owned}
        if not isinstance(module, _DEFAULT_LAYERS):
            continue
        weight = None if parametrize.is_parametrized(module, "weight") else module.weight
        if isinstance(weight, nn.Parameter):
            identities.add(id(weight))
        else:
            warn_user(
                f"the weight of {prefix or 'the model'!r} ({type(module).__name__}) is computed "
                "from other tensors (a parametrization) and is not selected"
            )
    return {name for name, value in canonical.items() if id(value) in identities}


def _match(
    model: nn.Module,
    canonical: dict[str, nn.Parameter],
    default: set[str],
    patterns: list[str],
) -> set[str]:
    first_name = {id(value): name for name, value in canonical.items()}
    # A shared parameter may be selected by any of its names.
    names = {
        name: first_name[id(value)]
        for name, value in model.named_parameters(remove_duplicate=False)
    }
    modules = [m for m in model.modules() if isinstance(m, _EMBEDDINGS)]
    embeddings = {first_name[id(m.weight)] for m in modules if id(m.weight) in first_name}
    included: set[str] = set()
    excluded: set[str] = set()
    only_exclusions = True
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise InvalidArgument(
                f"parameters must be names and patterns, got {type(pattern).__name__}"
            )
        exclude = pattern.startswith("!")
        body = pattern[1:] if exclude else pattern
        if body in names:
            hits = {names[body]}
        elif _WILDCARDS.isdisjoint(body):
            hits = set()
        else:
            every = {full for name, full in names.items() if fnmatchcase(name, body)}
            hits = every if exclude else (every & default or every & embeddings or every)
        if not hits:
            raise UnknownParameter(
                f"parameters: {pattern!r} matches no parameter of the model"
                f"{did_you_mean(body, names, cutoff=0.4)}"
            )
        if exclude:
            excluded |= hits
        else:
            only_exclusions = False
            included |= hits
    return (default if only_exclusions else included) - excluded


def model_parameters(
    model: nn.Module, shapes: Mapping[str, Sequence[int]]
) -> dict[str, nn.Parameter]:
    """Return the parameters of a model by name, after a check of their shapes.

    Args:
        model: Any module.
        shapes: Name to expected shape.

    Raises:
        UnknownParameter: A parameter is missing, or has another shape.
    """
    owned = dict(model.named_parameters(remove_duplicate=False))
    for name, shape in shapes.items():
        if name not in owned:
            raise UnknownParameter(
                f"model: has no parameter {name!r}; pass the model that the statistics, scores or "
                "masks were computed for"
            )
        if tuple(owned[name].shape) != tuple(shape):
            raise UnknownParameter(
                f"model: parameter {name!r} must have shape {tuple(shape)}, got "
                f"{tuple(owned[name].shape)}; pass the model that the statistics, scores or masks "
                "were computed for"
            )
    return {name: owned[name] for name in shapes}


def check_finite_weights(parameters: Mapping[str, Tensor]) -> None:
    """Raise InvalidArgument if a weight is NaN or infinite; the message names the parameter."""
    for name, weights in parameters.items():
        if not bool(torch.isfinite(weights.detach()).all()):
            raise InvalidArgument(f"model: parameter {name!r} has NaN or infinite weights")


def check_mask_shapes(
    argument: str, masks: Mapping[str, Tensor], parameters: Mapping[str, Tensor]
) -> None:
    """Raise MaskError if the shape of a mask differs from that of its parameter."""
    for name, mask in masks.items():
        if name in parameters and mask.shape != parameters[name].shape:
            raise MaskError(
                f"{argument}: {name!r} must have shape {tuple(parameters[name].shape)}, got "
                f"{tuple(mask.shape)}"
            )
