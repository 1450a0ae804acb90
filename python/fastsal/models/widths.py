"""The widths of a model from which whole units were removed.

Layers store their widths twice: in the shapes of their tensors, and as numbers such as
`out_features` and `num_heads`. The numbers that changed are recorded with the model and in the
metadata of its file, so that a model built at its original size can be made as small again.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastsal.errors import FileFormatError
from fastsal.utils.interrupts import uninterrupted
from fastsal.utils.numbers import as_integer

Widths = dict[str, dict[str, int]]  # name of a module to its attributes

METADATA = "fastsal.widths"
_RECORD = "fastsal_widths"  # attribute of a model, so that copies have it too
# Numbers that a file may set.
ATTRIBUTES = frozenset(
    {
        "in_features", "out_features", "in_channels", "out_channels", "groups", "num_features",
        "num_heads", "attn_dim", "all_head_dim",
    }
)  # fmt: skip


def widths_of(model: nn.Module) -> Widths:
    """Return the recorded widths of a model; empty for a model of its original size."""
    found = vars(model).get(_RECORD, {})
    return {name: dict(values) for name, values in found.items()}


def record_widths(model: nn.Module, widths: Widths) -> None:
    """Replace the recorded widths of a model."""
    if widths:
        setattr(model, _RECORD, {name: dict(values) for name, values in widths.items()})
    else:
        vars(model).pop(_RECORD, None)


def with_widths(model: nn.Module, changes: Mapping[str, Mapping[str, int]]) -> Widths:
    """Return the recorded widths of a model with further changes."""
    found = widths_of(model)
    for name, values in changes.items():
        found.setdefault(name, {}).update(values)
    return found


def encoded(widths: Widths) -> dict[str, str]:
    """Return the entry of a file's metadata; empty without widths."""
    return {METADATA: json.dumps(widths, sort_keys=True)} if widths else {}


def decoded(metadata: Mapping[str, str] | None, path: object) -> Widths:
    """Return the widths in a file's metadata.

    Raises:
        FileFormatError: They have another form.
    """
    text = (metadata or {}).get(METADATA)
    if text is None:
        return {}
    try:
        found = {
            str(name): {str(key): as_integer(value) for key, value in values.items()}
            for name, values in json.loads(text).items()
        }
    except (ValueError, AttributeError):
        raise FileFormatError(f"weights: the widths in {path} are damaged") from None
    checked: Widths = {}
    for name, values in found.items():
        for key, value in values.items():
            if key not in ATTRIBUTES or value is None or value < 1:
                raise FileFormatError(
                    f"weights: {path} has the width {key!r} of {name!r}, which no layer has"
                )
            checked.setdefault(name, {})[key] = value
    return checked


@contextlib.contextmanager
def resized(
    model: nn.Module, widths: Widths, state: Mapping[str, Tensor], path: object
) -> Iterator[None]:
    """Make a model as small as the one that was stored; if the block raises, it is as before.

    Tensors are replaced by ones of the shapes in `state`, whose values the block loads.

    Args:
        model: A model of the original size, or of the stored one.
        widths: Name of a module to its numbers; empty for a model of the original size.
        state: Names and shapes of the stored tensors.
        path: The file, for messages.

    Raises:
        FileFormatError: The model has no such layers, or is smaller.
    """
    before = widths_of(model)
    if widths == before or not widths:
        yield
        return
    modules = dict(model.named_modules())
    for name, values in widths.items():
        module = modules.get(name)
        for key in values:
            if as_integer(getattr(module, key, None)) is None:
                raise FileFormatError(
                    f"weights: {path} is of a model whose {name!r} has {key}, which this model has "
                    "not; build the model that was pruned"
                )
    changes = _smaller(model, state, path)
    numbers = [
        (modules[name], key, value, getattr(modules[name], key))
        for name, values in widths.items()
        for key, value in values.items()
    ]
    old_data = [tensor.data for tensor, _ in changes]
    try:
        for tensor, shape in changes:
            tensor.data = torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)
        for module, key, value, _ in numbers:
            setattr(module, key, value)
        record_widths(model, widths)
        yield
    except BaseException:
        with uninterrupted():
            for (tensor, _), data in zip(changes, old_data, strict=True):
                tensor.data = data
            for module, key, _, old in numbers:
                setattr(module, key, old)
            record_widths(model, before)
        raise


def _smaller(
    model: nn.Module, state: Mapping[str, Tensor], path: object
) -> list[tuple[Tensor, torch.Size]]:
    """Return the tensors that are stored in smaller shapes, and these shapes."""
    found: dict[int, tuple[Tensor, torch.Size]] = {}
    # By all names of a shared tensor: a file has one of them, which need not be the first.
    names = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    for name, tensor in names:
        stored = state.get(name)
        if stored is None or stored.shape == tensor.shape:
            continue
        is_smaller = stored.dim() == tensor.dim() and all(
            a <= b for a, b in zip(stored.shape, tensor.shape, strict=True)
        )
        if not is_smaller:
            raise FileFormatError(
                f"weights: {path} has {name!r} in shape {list(stored.shape)}, which is no part of "
                f"the model's {list(tensor.shape)}; build the model that was pruned"
            )
        found[id(tensor)] = tensor, stored.shape
    return list(found.values())


def read_widths(path: Any) -> Widths:
    """Return the widths in the metadata of a safetensors file; empty for other files."""
    from safetensors import SafetensorError, safe_open

    if not str(path).endswith(".safetensors"):
        return {}
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata()
    except (SafetensorError, OSError):
        return {}  # what is wrong with the file is said where its tensors are read
    return decoded(metadata, path)
