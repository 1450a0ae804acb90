"""The groups of units of a model: found by a trace, then proven."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastsal.gradients.weight_macs import weight_macs
from fastsal.models.evaluating import outputs
from fastsal.models.features import feature_outputs, find_feature_layer
from fastsal.models.hooks import hooked
from fastsal.pruning.structured.graph import Graph
from fastsal.pruning.structured.groups import Group
from fastsal.pruning.structured.heads import find_heads
from fastsal.pruning.structured.proof import proven
from fastsal.pruning.structured.trace import find_units


@dataclass(frozen=True)
class Units:
    """The groups of units of a model.

    Attributes:
        groups: Proven groups, in the order of the forward pass.
        left_out: Name of a layer or of an attention to the reason why nothing is removed from it.
        macs: Name of a parameter to the multiply-accumulates of one of its weights for one image.
        normalization: Name of a consumer to that of the batch normalization right after it.
    """

    groups: list[Group]
    left_out: dict[str, str]
    macs: dict[str, int]
    normalization: dict[str, str]


def find(model: nn.Module, images: Tensor, kind: str) -> Units:
    """Find the groups of one kind.

    Args:
        model: Any module; it is as before at the end.
        images: `[n, ...]`; two are used.
        kind: `"mlp"`, `"heads"` or `"channels"`.
    """
    graph = Graph(model, images)
    heads = find_heads(model, {call.name for call in graph.calls})
    if kind == "heads":
        found = heads
    else:
        layers = {name for group in heads.groups for name in group.producers}
        found = find_units(graph, model, kind, layers)
    used = _used(model, images, [name for group in found.groups for name in group.consumers])
    unused = {
        group.name: "its units do not contribute to the features"
        for group in found.groups
        if not used.issuperset(group.consumers)
    }
    candidates = [group for group in found.groups if group.name not in unused]
    groups, failed = proven(model, candidates, images)
    consumers = {name for group in groups for name in group.consumers}
    after = {
        call.name: graph.normalization_after(call, model)
        for call in graph.calls
        if call.name in consumers
    }
    return Units(
        groups,
        {**found.left_out, **unused, **failed},
        weight_macs(model, images),
        {name: other for name, other in after.items() if other is not None},
    )


def _used(model: nn.Module, images: Tensor, names: list[str]) -> set[str]:
    """Return the layers that are called for the features of a model."""
    found: set[str] = set()
    with hooked(
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: found.add(name))
        for name in names
    ):
        find_feature_layer(model, images)
        with torch.random.fork_rng(devices=[]):
            outputs(model, images[:2], feature_outputs)
    return found
