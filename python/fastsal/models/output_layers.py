"""The layers that produce the output of a model, found in the graph of one forward pass.

The order in which layers are defined says nothing about the flow of data: a head may be defined
first. Autograd records the flow.
"""

from __future__ import annotations

import contextlib
import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastsal.errors import InvalidArgument
from fastsal.models.evaluating import (
    differentiable,
    evaluating,
    pair_of,
    to_model,
)
from fastsal.models.outputs import output_tensor
from fastsal.utils.interrupts import uninterrupted

_PRODUCT = re.compile(r"^(Addmm|Addbmm|Baddbmm|Bmm|Mm|Addmv|Mv)Backward|Linear|Conv")
_NORMALIZATION = re.compile(r"(Batch|Layer|Group|Instance|Rms|RMS)_?Norm")
_PARAMETRIZED = re.compile(r"\.?parametrizations\..*")

_Node = Any  # torch.autograd.graph.Node


def output_layers(model: nn.Module, images: Tensor) -> list[str]:
    """Return the names of the layers that produce the output of a model; empty if none does alone.

    These are the linear maps (`Linear`, or a convolution of kernel size 1) whose outputs become the
    output without another layer in between; several only if none depends on another, as in a model
    with two heads. Normalization and residual connections before the output end the search: such an
    output is that of a backbone.

    Args:
        model: Any module; its modes, flags and random numbers are restored.
        images: `[n, ...]`, images or token ids; two are used.

    Raises:
        Exception: Whatever the model raises on these images.
    """
    with _all_trained(model), differentiable(), torch.random.fork_rng(devices=[]):
        pair = to_model(pair_of(images), model)
        if pair.is_floating_point():
            pair.requires_grad_()
        # Not through `__call__`: hooks of the user see the passes of the run only.
        try:
            output = output_tensor(model.forward(pair.clone()))  # which it may modify
        except InvalidArgument:  # of no tensor, or of several
            return []
        if output.grad_fn is None:
            return []
        graph = _Graph(pair if pair.is_floating_point() else None)
        found = graph.last_products(output.grad_fn)
        names = {id(p): name for name, p in model.named_parameters()}
    matrices = (p for product in found for p in product.matrices)
    layers = {_layer(names[id(p)]) for p in matrices if id(p) in names}
    return [name for name, _ in model.named_modules() if name in layers]


@contextlib.contextmanager
def _all_trained(model: nn.Module) -> Iterator[None]:
    """Use evaluation mode with gradients for all parameters and without hooks, then restore all."""
    flags = [(p, p.requires_grad) for p in model.parameters() if p.is_floating_point()]
    hooks = [(module, module._forward_hooks) for module in model.modules()]
    with evaluating(model):
        try:
            for p, _ in flags:
                p.requires_grad_(True)
            for module, _ in hooks:
                module._forward_hooks = OrderedDict()
            yield
        finally:
            with uninterrupted():
                for module, own in hooks:
                    module._forward_hooks = own
                for p, requires_grad in flags:
                    p.requires_grad_(requires_grad)


def _layer(parameter: str) -> str:
    """Return the name of the layer that has a parameter, or a parametrization of it."""
    return _PARAMETRIZED.sub("", parameter.rpartition(".")[0] + ".").rstrip(".")


@dataclass(frozen=True)
class _Product:
    """A product of data and weights.

    Attributes:
        node: Its node.
        data: Nodes of the data.
        matrices: The weights with two axes or more.
    """

    node: _Node
    data: list[_Node]
    matrices: list[Tensor]

    @property
    def is_linear(self) -> bool:
        """Whether each output depends on one position of the input."""
        return all(set(p.shape[2:]) <= {1} for p in self.matrices)


class _Graph:
    """The graph of a forward pass.

    Args:
        images: The leaf that data comes from; None for token ids, whose embeddings are data.
    """

    def __init__(self, images: Tensor | None) -> None:
        self._images = images
        self._is_data: dict[_Node, bool] = {}

    def last_products(self, output: _Node) -> list[_Product]:
        """Return the products from which a node is computed without another one in between.

        Empty if there is another path from the images to the output, or one product depends on
        another.
        """
        self._mark(output)
        found: list[_Product] = []
        seen, waiting = {output}, [output]
        while waiting:
            node = waiting.pop()
            data, matrices = self._inputs(node)
            if matrices and _PRODUCT.search(node.name()):
                found.append(_Product(node, data, matrices))
                continue
            if not data or _NORMALIZATION.search(node.name()):
                return []
            fresh = [child for child in data if child not in seen]
            seen.update(fresh)
            waiting += fresh
        below = self._below(child for product in found for child in product.data)
        products = (node for node in below if _PRODUCT.search(node.name()))
        earlier = {id(p) for node in products for p in self._inputs(node)[1]}
        is_last = all(
            product.is_linear and earlier.isdisjoint(map(id, product.matrices)) for product in found
        )
        return found if is_last else []

    def _inputs(self, node: _Node) -> tuple[list[_Node], list[Tensor]]:
        """Return the nodes of the data that a node depends on, and the matrices of weights."""
        children = _children(node)
        data = [child for child in children if self._is_data[child]]
        weights = self._below(child for child in children if not self._is_data[child])
        leaves = [leaf for n in weights if (leaf := getattr(n, "variable", None)) is not None]
        return data, [leaf for leaf in leaves if leaf.dim() > 1]

    def _mark(self, output: _Node) -> None:
        """Find the nodes that depend on the images."""
        waiting = [(output, False)]
        while waiting:
            node, is_done = waiting.pop()
            children = _children(node)
            if is_done:
                self._is_data[node] = self._is_source(node) or any(map(self._is_data.get, children))
            elif node not in self._is_data:
                self._is_data[node] = False
                waiting.append((node, True))
                waiting += [(child, False) for child in children]

    def _is_source(self, node: _Node) -> bool:
        if self._images is None:
            return "Embedding" in node.name()
        return getattr(node, "variable", None) is self._images

    def _below(self, nodes: Iterable[_Node]) -> dict[_Node, None]:
        """Return nodes and all that they depend on, in the order in which they are reached."""
        waiting = list(nodes)
        seen = dict.fromkeys(waiting)
        while waiting:
            fresh = [child for child in _children(waiting.pop()) if child not in seen]
            seen.update(dict.fromkeys(fresh))
            waiting += fresh
        return seen


def _children(node: _Node) -> list[_Node]:
    return [child for child, _ in node.next_functions if child is not None]
