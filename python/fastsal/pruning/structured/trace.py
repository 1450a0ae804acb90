"""Candidates for groups of hidden units, found in the graph of one forward pass.

A space is a candidate if no residual connection, normalization over channels, concatenation or
output of the model is in it, and all dense layers around it have its width. `proof` then checks
each candidate.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastsal.pruning.structured.graph import (
    BATCH_NORMALIZATION,
    Call,
    Graph,
    Space,
    children,
    is_depthwise,
    widths,
)
from fastsal.pruning.structured.groups import NOT_IN_FILES, Group, Number, Slice, is_temporary

# Operations between units, by the names of their nodes, and what to say of them.
_BETWEEN = {
    re.compile("Cat|Stack"): "its units are concatenated with others",
    re.compile("LayerNorm|GroupNorm|RMSNorm|RmsNorm|InstanceNorm"): "a normalization is over its "
    "units",
    re.compile("Softmax|ScaledDotProduct"): "its units take part in attention",
}
_SUM = re.compile("^(Add|Sub)Backward")
# Of most models some layers are so.
IS_OUTPUT = "its units are outputs or features of the model"


class LeftOutError(Exception):
    """A space is no group of units; the message says why."""


@dataclass(frozen=True)
class Found:
    """What a trace has found.

    Attributes:
        groups: Candidates.
        left_out: Name of a layer to the reason why its outputs are no units.
    """

    groups: list[Group]
    left_out: dict[str, str]


def find_units(graph: Graph, model: nn.Module, kind: str, heads: set[str]) -> Found:
    """Find hidden units.

    Args:
        graph: The graph of `model`.
        model: The model.
        kind: `"mlp"`: between `Linear` layers or 1x1 convolutions with nothing but activations in
            between; `"channels"`: all others between convolutions.
        heads: Names of layers of attention, whose units are heads.
    """
    spaces = list(graph.spaces())
    names = _Names(model, graph, spaces)
    found = Found([], {})
    for space in spaces:
        producers = [call.name for call in space.producers]
        if heads.intersection(producers):
            continue
        own = names.kind(space)
        try:
            group = names.group(space, own)
        except LeftOutError as error:
            if own == kind:
                found.left_out.update(dict.fromkeys(producers, str(error)))
            continue
        if own == kind:
            found.groups.append(group)
    for call in graph.calls:
        if call.result is None and call.name not in heads and _usual_kind(call.layer) == kind:
            found.left_out[call.name] = "its outputs have no gradients, which tell what uses them"
    return found


def _usual_kind(layer: nn.Module) -> str:
    """Return the kind of the units of a layer of which nothing else is known."""
    return "channels" if _kernel(layer) else "mlp"


def _kernel(layer: nn.Module) -> tuple[int, ...]:
    return tuple(getattr(layer, "kernel_size", ()))


class _Names:
    """Modules and names of the tensors of a model."""

    def __init__(self, model: nn.Module, graph: Graph, spaces: list[Space]) -> None:
        self._uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
        self._calls = Counter(call.name for call in graph.calls)
        # Layers whose outputs, one for all positions, scale the units of others.
        self._gates = {
            call
            for space in spaces
            for call in space.producers
            if call.positions == 1 < max(other.positions for other in space.producers)
        }
        self._owners = {
            id(p): (name, module, own)
            for name, module in model.named_modules()
            for own, p in module.named_parameters(recurse=False)
        }

    def kind(self, space: Space) -> str:
        """Return the kind of the units of a space; `"gate"` for those of squeeze-excitation."""
        calls = space.producers + space.consumers
        if all(isinstance(call.layer, nn.Linear) for call in calls):
            return "mlp"
        if any(set(_kernel(call.layer)) - {1} for call in calls):
            return "channels"
        owners = [self._owners[id(p)][1] for p in space.parameters if id(p) in self._owners]
        if any(is_depthwise(m) or isinstance(m, BATCH_NORMALIZATION) for m in owners):
            return "channels"
        return "gate" if self._gates.issuperset(space.consumers) else "mlp"

    def group(self, space: Space, kind: str) -> Group:
        """Return the group of a space.

        Raises:
            LeftOutError: It is none.
        """
        self._check(space)
        units = widths(space.consumers[0].layer)[1]
        index = torch.arange(units, device="cpu")[:, None]
        slices: list[Slice] = []
        numbers: list[Number] = []
        for call in space.producers:
            # Twice as many outputs are those of a gated MLP: unit j has the places j and j + units.
            parts = widths(call.layer)[0] // units
            places = torch.cat([index + part * units for part in range(parts)], dim=1)
            slices += [Slice(call.name, "weight", 0, places)]
            slices += [Slice(call.name, "bias", 0, places)] if call.layer.bias is not None else []
            is_linear = isinstance(call.layer, nn.Linear)
            key = "out_features" if is_linear else "out_channels"
            numbers.append(Number(call.name, key, parts))
        for call in space.consumers:
            slices.append(Slice(call.name, "weight", 1, index))
            is_linear = isinstance(call.layer, nn.Linear)
            numbers.append(Number(call.name, "in_features" if is_linear else "in_channels"))
        for parameter in space.parameters:
            more, counted = self._between(parameter, units)
            slices += [part for part in more if all(part.name != s.name for s in slices)]
            numbers += [number for number in counted if number not in numbers]
        # The consumer that computes most from the units is the one that scores them.
        consumers = sorted(space.consumers, key=lambda call: -_work(call))
        return Group(
            space.producers[0].name,
            units,
            tuple(call.name for call in space.producers),
            tuple(call.name for call in consumers),
            tuple(slices),
            tuple(numbers),
            kind,
        )

    def _check(self, space: Space) -> None:
        calls = space.producers + space.consumers
        for call in calls:
            self._check_layer(call)
        if space.reaches_output:
            raise LeftOutError(IS_OUTPUT)
        if not space.consumers:
            raise LeftOutError("no linear layer or convolution uses its units alone")
        _check_between(space)
        units = widths(space.consumers[0].layer)[1]
        for call in calls:
            width = widths(call.layer)[0 if call in space.producers else 1]
            is_gated = call in space.producers and width == 2 * units
            if width != units and not is_gated:
                name = space.consumers[0].name
                raise LeftOutError(
                    f"{call.name!r} has {width} units, not the {units} inputs of {name!r}"
                )
        for call in space.consumers:
            _check_padding(call)

    def _check_layer(self, call: Call) -> None:
        if self._calls[call.name] > 1:
            raise LeftOutError(f"{call.name!r} is called {self._calls[call.name]} times")
        if parametrize.is_parametrized(call.layer):
            raise LeftOutError(f"the weight of {call.name!r} is computed")
        if getattr(call.layer, "groups", 1) != 1:
            raise LeftOutError(f"{call.name!r} is a grouped convolution")
        if any(self._uses[id(p)] > 1 for p in call.layer.parameters(recurse=False)):
            raise LeftOutError(f"{call.name!r} shares its weight with another layer")

    def _between(self, parameter: Tensor, units: int) -> tuple[list[Slice], list[Number]]:
        """Return the places of the units in a parameter that acts on them."""
        if id(parameter) not in self._owners:
            raise LeftOutError("a parameter acts on its units that is none of the model")
        name, module, own = self._owners[id(parameter)]
        label = f"{name}.{own}" if name else own
        if self._uses[id(parameter)] > 1 or parametrize.is_parametrized(module):
            raise LeftOutError(f"{label!r} acts on its units, and is shared or computed")
        if parameter.numel() == 1 < units:  # the same for all units, as of a PReLU
            return [], []
        axes = [axis for axis, size in enumerate(parameter.shape) if size == units]
        if is_depthwise(module):
            axes = [0]
        elif len(axes) != 1 or parameter.numel() != units:
            raise LeftOutError(f"{label!r} acts on its units, not on each alone")
        index = torch.arange(units, device="cpu")[:, None]
        slices, numbers = [Slice(name, own, axes[0], index)], []
        for buffer, value in module.named_buffers(recurse=False):
            if tuple(value.shape) != (units,):
                continue
            if is_temporary(module, buffer):
                raise LeftOutError(NOT_IN_FILES.format(f"{name}.{buffer}"))
            slices.append(Slice(name, buffer, 0, index))
        attributes = ("num_features", "out_channels", "in_channels", "groups")
        numbers += [Number(name, key) for key in attributes if getattr(module, key, None) == units]
        return slices, numbers


def _check_between(space: Space) -> None:
    """Raise LeftOutError if an operation between the layers is over units, or adds others."""
    has_volumes = any(len(_kernel(call.layer)) == 3 for call in space.producers + space.consumers)
    for node in space.nodes:
        for pattern, why in _BETWEEN.items():
            if pattern.search(node.name()):
                raise LeftOutError(why)
        # As of a local response normalization, whose effect may be too small for the proof.
        if "AvgPool3D" in node.name() and not has_volumes:
            raise LeftOutError("a pooling is over its units")
        data = [child for child in children(node) if not hasattr(child, "variable")]
        is_sum = _SUM.search(node.name()) and len(data) > 1
        if is_sum and len(space.producers) > 1:
            raise LeftOutError("its units are added to those of other layers")


def _check_padding(call: Call) -> None:
    """Raise LeftOutError unless the patches of a consumer are known, see `input_rows`."""
    if not set(_kernel(call.layer)) - {1}:
        return
    if len(_kernel(call.layer)) > 2:
        raise LeftOutError(f"the kernel of {call.name!r} has three axes")
    has_own = type(call.layer).forward not in (nn.Conv1d.forward, nn.Conv2d.forward)
    if has_own or getattr(call.layer, "padding_mode", "zeros") != "zeros":
        raise LeftOutError(f"the padding of {call.name!r} is its own")


def _work(call: Call) -> int:
    """Return the operations of a layer, which those of squeeze-excitation have few of."""
    weight: Tensor = call.layer.weight  # type: ignore[assignment]
    return weight.numel() * call.positions
