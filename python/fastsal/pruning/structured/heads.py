"""Heads of attention: rows of q, k and v, and columns of the projection.

Any module with a number of heads, `num_heads`, linear layers for queries, keys and values, and one
for the projection of the result is a candidate. `proof` checks that its `forward` reads the number
of heads, and not a width that it was built with.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastsal.pruning.structured.groups import NOT_IN_FILES, Group, Number, Slice, is_temporary
from fastsal.pruning.structured.trace import Found
from fastsal.utils.numbers import as_integer

# Names of the layers of queries, keys and values, and how many of these each one has.
_INPUTS = {
    "qkv": 3, "kv": 2, "q": 1, "k": 1, "v": 1, "q_proj": 1, "k_proj": 1, "v_proj": 1, "gate": 1,
}  # fmt: skip
_WIDTHS = ("attn_dim", "all_head_dim")


def find_heads(model: nn.Module, called: set[str]) -> Found:
    """Find the heads of attention.

    Args:
        model: The model.
        called: Names of the dense layers that a forward pass calls.
    """
    found = Found([], {})
    for name, module in model.named_modules():
        heads = as_integer(getattr(module, "num_heads", None))
        if heads is None or not any(True for _ in module.children()):
            continue
        if isinstance(module, nn.MultiheadAttention):
            found.left_out[name] = "the heads of nn.MultiheadAttention have a fixed width"
            continue
        projection = getattr(module, "proj", None)
        inputs = {
            key: layer
            for key in _INPUTS
            if isinstance(layer := getattr(module, key, None), nn.Linear)
        }
        if not isinstance(projection, nn.Linear) or not inputs:
            if any(isinstance(child, nn.Linear) for child in module.children()):
                found.left_out[name] = "its layers are not those of a known attention"
            continue
        width = projection.in_features
        if heads < 2 or width % heads:
            found.left_out[name] = f"it has {heads} head{'s' if heads != 1 else ''}"
        elif any(layer.out_features != _INPUTS[key] * width for key, layer in inputs.items()):
            found.left_out[name] = "queries, keys and values have another width than the result"
        elif not all(f"{name}.{key}" in called for key in [*inputs, "proj"]):
            found.left_out[name] = "its layers are not called as modules"
        else:
            group = _group(name, module, inputs, heads, width)
            made = [
                s.name for s in group.slices if s.module == name and is_temporary(module, s.tensor)
            ]
            if made:
                found.left_out[name] = NOT_IN_FILES.format(made[0])
            else:
                found.groups.append(group)
    return found


def _group(
    name: str, module: nn.Module, inputs: dict[str, nn.Linear], heads: int, width: int
) -> Group:
    each = width // heads
    own = torch.arange(width, device="cpu").view(heads, each)
    slices: list[Slice] = []
    numbers = [Number(name, "num_heads")]
    for key in _WIDTHS:
        if getattr(module, key, None) == width:
            numbers.append(Number(name, key, each))
    for key, layer in inputs.items():
        index = torch.cat([own + part * width for part in range(_INPUTS[key])], dim=1)
        slices.append(Slice(f"{name}.{key}", "weight", 0, index))
        if layer.bias is not None:
            slices.append(Slice(f"{name}.{key}", "bias", 0, index))
        numbers.append(Number(f"{name}.{key}", "out_features", _INPUTS[key] * each))
    slices.append(Slice(f"{name}.proj", "weight", 1, own))
    numbers.append(Number(f"{name}.proj", "in_features", each))
    one = torch.arange(heads, device="cpu")[:, None]
    tensors: list[tuple[str, Tensor]] = [
        *module.named_parameters(recurse=False),
        *module.named_buffers(recurse=False),
    ]
    for key, value in tensors:  # such as biases of relative positions, and biases of q and v
        for size, index in ((heads, one), (width, own)):
            axes = [axis for axis, length in enumerate(value.shape) if length == size]
            if len(axes) == 1:
                slices.append(Slice(name, key, axes[0], index))
                break
    return Group(
        name,
        heads,
        tuple(f"{name}.{key}" for key in inputs),
        (f"{name}.proj",),
        tuple(slices),
        tuple(numbers),
        "heads",
    )
