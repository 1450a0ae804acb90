"""The flow of data between the dense layers of a model, from the graph of one forward pass.

A dense layer is a `Linear` or a convolution that mixes its channels. Between dense layers lie
*spaces*: all tensors that are connected without a dense layer in between, such as the residual
stream, or the hidden layer of an MLP.
"""

from __future__ import annotations

import contextlib
import re
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastsal.models.classifier import classifier_of
from fastsal.models.evaluating import (
    differentiable,
    drop_kept,
    evaluating,
    input_of,
    pair_of,
    to_model,
)
from fastsal.models.hooks import hooked
from fastsal.models.outputs import tensors_within
from fastsal.utils.interrupts import uninterrupted

BATCH_NORMALIZATION = nn.modules.batchnorm._BatchNorm
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

Node = Any  # torch.autograd.graph.Node


@dataclass(eq=False)
class Call:
    """One call of a dense layer.

    Attributes:
        name: Name of the layer.
        layer: The layer.
        source: Node of its input; None for the images.
        result: Node of its output.
        positions: Outputs of a channel for one image, pixels or tokens.
        nodes: All nodes inside of it.
    """

    name: str
    layer: nn.Module
    source: Node
    result: Node
    positions: int
    nodes: set[Node] = field(default_factory=set)


@dataclass
class Space:
    """Tensors that are connected without a dense layer in between.

    Attributes:
        producers: Calls whose outputs are in it.
        consumers: Calls whose inputs are in it.
        nodes: Its nodes.
        parameters: Parameters that act inside of it.
        reaches_output: Whether it includes an output of the model, or its features.
    """

    producers: list[Call] = field(default_factory=list)
    consumers: list[Call] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    parameters: list[Tensor] = field(default_factory=list)
    reaches_output: bool = False


def is_dense(layer: nn.Module) -> bool:
    """Whether a layer mixes its channels; a depthwise convolution does not."""
    if isinstance(layer, _CONVOLUTIONS):
        return not is_depthwise(layer)
    return isinstance(layer, nn.Linear)


def is_depthwise(layer: nn.Module) -> bool:
    """Whether a layer is a convolution of each channel with itself."""
    if not isinstance(layer, _CONVOLUTIONS):
        return False
    return layer.groups == layer.in_channels == layer.out_channels > 1


def widths(layer: nn.Module) -> tuple[int, int]:
    """Return the numbers of outputs and of inputs of a dense layer."""
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    return layer.out_channels, layer.in_channels  # type: ignore[return-value]


class Graph:
    """The calls and spaces of a model.

    Args:
        model: Any module; its modes, flags and hooks are restored.
        images: `[n, ...]`; two are used.

    Attributes:
        calls: Calls of dense layers, in order.

    Raises:
        Exception: Whatever the model raises on these images.
    """

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        self.calls: list[Call] = []
        with traced(model), self._recording(model), torch.random.fork_rng(devices=[]):
            outputs = model(to_model(pair_of(images), model))
        self._roots = {t.grad_fn for t in tensors_within(outputs) if t.grad_fn is not None}
        self._heads = set(classifier_of(model, images))
        self._users: dict[Node, list[Node]] = {}
        self._find_users()
        self._inside: dict[Node, Call] = {}
        self._find_insides()
        self._results = {call.result: call for call in self.calls}

    @contextlib.contextmanager
    def _recording(self, model: nn.Module) -> Iterator[None]:
        sources: dict[nn.Module, Node] = {}
        names: dict[nn.Module, str] = {
            module: name for name, module in model.named_modules() if is_dense(module)
        }

        def before(layer: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            sources[layer] = input_of(given, named).grad_fn

        def after(layer: nn.Module, _: object, result: Tensor) -> None:
            name, places = names[layer], result.numel() // max(1, len(result) * widths(layer)[0])
            self.calls.append(Call(name, layer, sources[layer], result.grad_fn, places))

        with hooked(
            handle
            for layer in names
            for handle in (
                layer.register_forward_pre_hook(before, with_kwargs=True),
                layer.register_forward_hook(after),
            )
        ):
            yield

    def normalization_after(self, call: Call, model: nn.Module) -> str | None:
        """Return the batch normalization that alone uses the output of a call; None without one.

        Nor does it normalize anything else: another layer would lose its mean, too.
        """
        users = self._users.get(call.result, [])
        if len(users) != 1 or not re.search("Batch_?Norm", users[0].name()):
            return None
        owners = {
            id(module.weight): name
            for name, module in model.named_modules()
            if isinstance(module, BATCH_NORMALIZATION) and module.running_mean is not None
        }
        own = [child for child in children(users[0]) if len(self._users[child]) == 1]
        variables = [getattr(child, "variable", None) for child in own]
        return next((owners[id(v)] for v in variables if v is not None and id(v) in owners), None)

    def spaces(self) -> Iterator[Space]:
        """Yield the space of every call's output, each once."""
        seen: set[Node] = set()
        for call in self.calls:
            if call.result is not None and call.result not in seen:
                space = self._space(call.result)
                seen.update(space.nodes)
                yield space

    def _space(self, start: Node) -> Space:
        found, seen, waiting = Space(), {start}, [start]
        while waiting:
            node = waiting.pop()
            found.nodes.append(node)
            found.reaches_output |= node in self._roots
            near: list[Node] = []
            for user in self._users.get(node, ()):
                call = self._inside.get(user)
                if call is None:
                    near.append(user)
                elif call not in found.consumers:
                    found.consumers.append(call)
                    found.reaches_output |= call.layer in self._heads
            if node in self._results:
                found.producers.append(self._results[node])
            else:
                for child in children(node):
                    variable = getattr(child, "variable", None)
                    if variable is None:
                        near.append(child)
                    elif all(variable is not p for p in found.parameters):
                        found.parameters.append(variable)
            fresh = [each for each in dict.fromkeys(near) if each not in seen]
            seen.update(fresh)
            waiting += fresh
        order = {call: i for i, call in enumerate(self.calls)}
        found.producers.sort(key=order.__getitem__)
        found.consumers.sort(key=order.__getitem__)
        return found

    def _find_users(self) -> None:
        waiting, seen = list(self._roots), set(self._roots)
        while waiting:
            node = waiting.pop()
            for child in children(node):
                self._users.setdefault(child, []).append(node)
                if child not in seen:
                    seen.add(child)
                    waiting.append(child)

    def _find_insides(self) -> None:
        for call in self.calls:
            waiting = [call.result]
            while waiting:
                node = waiting.pop()
                if node is None or node is call.source or node in call.nodes:
                    continue
                call.nodes.add(node)
                waiting += children(node)
            for node in call.nodes:
                self._inside[node] = call


def children(node: Node) -> list[Node]:
    """Return the nodes that a node depends on."""
    return [child for child, _ in node.next_functions if child is not None]


@contextlib.contextmanager
def traced(model: nn.Module) -> Iterator[None]:
    """Use evaluation mode with gradients for all parameters and without hooks, then restore all."""
    flags = [(p, p.requires_grad) for p in model.parameters() if p.is_floating_point()]
    hooks = [(m, m._forward_hooks, m._forward_pre_hooks) for m in model.modules()]
    with evaluating(model), differentiable():
        try:
            for p, _ in flags:
                p.requires_grad_(True)
            for module, *_ in hooks:
                module._forward_hooks = OrderedDict()
                module._forward_pre_hooks = OrderedDict()
            yield
        finally:
            with uninterrupted():
                for module, after, before in hooks:
                    module._forward_hooks = after
                    module._forward_pre_hooks = before
                for p, flag in flags:
                    p.requires_grad_(flag)
                drop_kept(model)
