"""The input axis of each parameter, along which groups of an N:M pattern lie.

The layer says which axis that is: axis 1 of a `Linear` or `ConvNd` `[out, in, ...]`, axis 0 of a
`ConvTransposeNd` `[in, out, ...]` or an `Embedding` `[tokens, features]`, a linear map of one-hot
tokens. A layer of another kind says it by an attribute `input_axis`: one axis for all of its
parameters, or a dict from parameter to axis.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from fastsal.errors import InvalidArgument
from fastsal.utils.numbers import whole


class Axes(NamedTuple):
    """The shape `[outer, width, inner]` of a parameter, around its input axis.

    Attributes:
        outer: Product of the axes before it; groups of a convolution count as such an axis.
        width: Inputs that one group of a pattern may lie in.
        inner: Product of the axes after it.
    """

    outer: int
    width: int
    inner: int


def input_axes(shape: Sequence[int]) -> Axes:
    """Return the axes of a parameter whose input axis is axis 1; a vector is one row."""
    if len(shape) < 2:
        return Axes(1, math.prod(shape), 1)
    return around(shape, 1)


def around(shape: Sequence[int], axis: int) -> Axes:
    """Return the axes of a parameter with a given input axis."""
    return Axes(math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :]))


class WithAxes(dict[str, Tensor]):
    """Tensors by parameter name, with what is known about the input axes of their parameters.

    Attributes:
        axes: Name to axes; parameters of unknown layers are left out.
    """

    def __init__(self, tensors: Mapping[str, Tensor], axes: Mapping[str, Axes]) -> None:
        super().__init__(tensors)
        self.axes = dict(axes)


def layer_axes(model: nn.Module, shapes: Mapping[str, Sequence[int]]) -> dict[str, Axes]:
    """Return the input axes of parameters, as their layers say.

    Args:
        model: The model.
        shapes: Name to shape, of some of its parameters.

    Raises:
        InvalidArgument: The layer of a parameter with two axes or more does not say it.
    """
    known = known_axes(model, shapes)
    for name in shapes:
        if name not in known:
            kind = type(_owners(model)[name][0][0]).__name__
            raise unknown_axis(name, f", as {kind} is not a layer of PyTorch that has one")
    return known


def known_axes(model: nn.Module, shapes: Mapping[str, Sequence[int]]) -> dict[str, Axes]:
    """Return the input axes of parameters, without those of unknown layers."""
    owners = _owners(model)
    found = {}
    for name, shape in shapes.items():
        if len(shape) < 2 or all(_is_container(m) for m, _ in owners.get(name, [])):
            found[name] = input_axes(shape)
            continue
        said = [_axes_of(module, own, shape) for module, own in owners.get(name, [])]
        # A table of embeddings that is also the weight of a linear map has the axes of the map.
        some = [axes for axes, is_table in said if axes is not None and not is_table]
        some += [axes for axes, is_table in said if axes is not None and is_table]
        if some:
            found[name] = some[0]
    return found


def unknown_axis(name: str, why: str = "") -> InvalidArgument:
    """Return the error that the input axis of a parameter is unknown."""
    return InvalidArgument(
        f"pattern: the input axis of {name!r} is unknown{why}; set input_axis (such as 0) of its "
        f"layer, or exclude it with parameters='!{name}'"
    )


def _owners(model: nn.Module) -> dict[str, list[tuple[nn.Module, str]]]:
    """Return the modules that have each parameter, and its name in them."""
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for own, p in module.named_parameters(recurse=False):
            found.setdefault(id(p), []).append((module, own))
        # The layer of a parametrized weight is the parent of the module that has the original.
        for own, inner in getattr(module, "parametrizations", {}).items():
            for p in inner.parameters(recurse=False):
                found.setdefault(id(p), []).insert(0, (module, own))
    return {
        name: found[id(p)]
        for name, p in model.named_parameters(remove_duplicate=False)
        if id(p) in found
    }


def _is_container(module: nn.Module) -> bool:
    """Whether a module has no `forward`, and so no input."""
    return type(module).forward is nn.Module.forward


_Rule = Callable[[nn.Module, Sequence[int]], Axes]


def _transposed(module: nn.Module, shape: Sequence[int]) -> Axes:
    groups = int(module.groups)  # type: ignore[arg-type]
    return Axes(groups, shape[0] // groups, math.prod(shape[1:]))


def _second(module: nn.Module, shape: Sequence[int]) -> Axes:
    del module
    return around(shape, 1)


def _first(module: nn.Module, shape: Sequence[int]) -> Axes:
    del module
    return around(shape, 0)


# Layers to the pattern of their parameters' names, the rule, and whether they look tokens up.
_RULES: list[tuple[tuple[type[nn.Module], ...], str, _Rule, bool]] = [
    (
        (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
        r"weight",
        _transposed,
        False,
    ),
    ((nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Bilinear), r"weight", _second, False),
    ((nn.MultiheadAttention,), r"(in|q|k|v)_proj_weight", _second, False),
    ((nn.RNNBase, nn.RNNCellBase), r"weight_.*", _second, False),
    ((nn.Embedding, nn.EmbeddingBag), r"weight", _first, True),
]
# `weight_norm` and `prune` of torch.nn.utils rename a weight.
_RENAMED = re.compile(r"_(v|orig)$")


def _axes_of(module: nn.Module, own: str, shape: Sequence[int]) -> tuple[Axes | None, bool]:
    """Return the axes that a layer says, or None, and whether it is a table of embeddings."""
    said = getattr(module, "input_axis", None)
    if isinstance(said, Mapping):
        said = said.get(own)
    if said is not None:
        return around(shape, whole("input_axis", said, 0, len(shape) - 1)), False
    name = own if isinstance(module, nn.RNNBase) else _RENAMED.sub("", own)
    for kinds, names, rule, is_table in _RULES:
        if isinstance(module, kinds) and re.fullmatch(names, name):
            return rule(module, shape), is_table
    if (type(module).__module__, type(module).__name__) == _GPT2_LINEAR and own == "weight":
        return _first(module, shape), False
    return None, False


# Its name says convolution; it is a linear map with the weight `[in, out]`.
_GPT2_LINEAR = ("transformers.pytorch_utils", "Conv1D")
