"""Which parameters are tracked: the default, exact names, and patterns."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastsal.errors import InvalidArgument, MaskError, UnknownParameter
from fastsal.utils.warn import warn_user

_TABLES = (nn.Embedding,)
_DEFAULT_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_WILDCARDS = frozenset("*?[")


def select_parameters(
    model: nn.Module, parameters: str | Sequence[str] | None = None
) -> dict[str, nn.Parameter]:
    """Choose the parameters of a model to work on.

    Args:
        model: Any module.
        parameters: None takes the weights of `nn.Linear` and `nn.ConvNd`. Otherwise one or more
            exact names or `fnmatch` patterns; a leading `!` excludes. A pattern chooses among the
            default weights; where it matches none of those among the tables of `nn.Embedding`, and
            where it matches none of these among all parameters, so that `"blocks.*"` does not take
            biases and `"*.in_proj_weight"` still works. An exact name takes any parameter.
            Exclusions alone start from the default. A table that is the weight of a `Linear` too,
            as of a language model with a tied head, is one of the default weights; `"!wte.weight"`
            leaves it out.

    Returns:
        Canonical name to parameter, in the order of `model.named_parameters()`.

    Raises:
        UnknownParameter: A name or a pattern matches nothing.
        InvalidArgument: Nothing is left, or a parameter has no shape yet.
    """
    canonical = dict(model.named_parameters())
    default = _default_names(model, canonical)
    if parameters is None:
        chosen = default
        if not chosen:
            raise InvalidArgument(
                "parameters: the model has no weight of nn.Linear or nn.ConvNd; "
                "name the parameters to take"
            )
    else:
        patterns = [parameters] if isinstance(parameters, str) else list(parameters)
        chosen = _match(model, canonical, default, patterns)
        if not chosen:
            raise InvalidArgument(f"parameters: {patterns!r} excludes everything it includes")
    selected = {name: value for name, value in canonical.items() if name in chosen}
    for name, value in selected.items():
        if isinstance(value, nn.parameter.UninitializedParameter):
            raise InvalidArgument(
                f"parameters: {name!r} is a lazy parameter without a shape; "
                "run the model on one batch first"
            )
        if not value.is_floating_point():
            raise InvalidArgument(
                f"parameters: {name!r} is {value.dtype}; only real floating point is taken"
            )
    return selected


def _default_names(model: nn.Module, canonical: dict[str, nn.Parameter]) -> set[str]:
    identities: set[int] = set()
    for prefix, module in model.named_modules():
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
    # A shared parameter may be asked for by any of its names.
    names = {
        name: first_name[id(value)]
        for name, value in model.named_parameters(remove_duplicate=False)
    }
    modules = [m for m in model.modules() if isinstance(m, _TABLES)]
    tables = {first_name[id(m.weight)] for m in modules if id(m.weight) in first_name}
    included: set[str] = set()
    excluded: set[str] = set()
    only_exclusions = True
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise InvalidArgument(
                f"parameters: takes names and patterns, got {type(pattern).__name__}"
            )
        exclude = pattern.startswith("!")
        body = pattern[1:] if exclude else pattern
        if body in names:
            hits = {names[body]}
        elif _WILDCARDS.isdisjoint(body):
            hits = set()
        else:
            every = {full for name, full in names.items() if fnmatchcase(name, body)}
            hits = every if exclude else (every & default or every & tables or every)
        if not hits:
            close = difflib.get_close_matches(body, names, n=3, cutoff=0.4)
            hint = f"; close: {', '.join(close)}" if close else ""
            raise UnknownParameter(
                f"parameters: {pattern!r} matches no parameter of the model{hint}"
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
