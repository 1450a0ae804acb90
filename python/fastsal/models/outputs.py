"""The tensor in what a model returns: a tensor, a dict, a tuple, or an object with fields.

Every default (cross-entropy, accuracy, held-out losses) uses the tensor that `output_tensor` finds.
A loss of the user gets what the model returns.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from fastsal.errors import InvalidArgument

# Names of logits, in order of preference: Transformers, then torchvision and others.
LOGITS = ("logits", "pred", "preds", "out", "output", "outputs", "prediction", "predictions")
# Names of features: DINOv2 and its successors, Transformers, and others.
FEATURES = ("x_norm_clstoken", "pooler_output", "features", "last_hidden_state")

_SHOWN = 8  # entries that a message describes


def output_tensor(
    found: Any, names: tuple[str, ...] = LOGITS, what: str = "logits [n, C]"
) -> Tensor:
    """Return the tensor of interest in the output of a model.

    A tensor is returned unchanged. Of a dict, a named tuple or an object with fields, it is the
    first of `names` that it has, or else its only tensor. Of a tuple or list, it is the first
    tensor.

    Args:
        found: What the model returned.
        names: Names to look for, in order.
        what: What the tensor should be, for the message.

    Raises:
        InvalidArgument: There is no such tensor, or several without one of the names.
    """
    if isinstance(found, Tensor):
        return found
    fields = _fields(found)
    if fields is not None:
        for name in names:
            if isinstance(fields.get(name), Tensor):
                return fields[name]  # type: ignore[no-any-return]
        if not isinstance(found, tuple):
            tensors = [value for value in fields.values() if isinstance(value, Tensor)]
            if len(tensors) == 1:
                return tensors[0]
    if isinstance(found, (tuple, list)):
        for value in found:
            if isinstance(value, Tensor):
                return value
    raise InvalidArgument(
        f"model must return {what}, or a dict or tuple that contains them (as {names[0]!r}), got "
        f"{described(found)}; pass a wrapper that returns the tensor, or a loss function of this "
        "output"
    )


def with_tensors(found: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return the output of a model with changed tensors; the same object if none changes.

    Dicts, tuples and lists are rebuilt with their types, dataclasses and namespaces are copied; any
    other object is returned unchanged.
    """
    if isinstance(found, Tensor):
        return change(found)
    if isinstance(found, Mapping):
        changed = {key: with_tensors(value, change) for key, value in found.items()}
        if all(changed[key] is found[key] for key in found):
            return found
        return _rebuilt(found, changed)
    if isinstance(found, (tuple, list)):
        values = [with_tensors(value, change) for value in found]
        if all(new is old for new, old in zip(values, found, strict=True)):
            return found
        return type(found)(*values) if hasattr(found, "_fields") else type(found)(values)
    # Other objects may refer to anything, the model included.
    has_fields = dataclasses.is_dataclass(found) or isinstance(found, SimpleNamespace)
    changed = {
        name: new
        for name, value in ((_fields(found) or {}) if has_fields else {}).items()
        if (new := with_tensors(value, change)) is not value
    }
    if changed:
        found = copy.copy(found)
        for name, value in changed.items():
            object.__setattr__(found, name, value)  # a dataclass may be frozen
    return found


def tensors_within(found: Any) -> Iterator[Tensor]:
    """Yield every tensor in the output of a model, each object once, but not those of modules."""
    waiting, seen = [found], set()
    while waiting:
        value = waiting.pop()
        if id(value) in seen or isinstance(value, nn.Module):
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            waiting += reversed(value)
        else:
            waiting += reversed((_fields(value) or {}).values())


def _rebuilt(found: Mapping[Any, Any], changed: dict[Any, Any]) -> Any:
    if dataclasses.is_dataclass(found) and not isinstance(found, type):  # as in Transformers
        return dataclasses.replace(found, **changed)
    try:
        return type(found)(changed)  # type: ignore[call-arg]
    except TypeError:
        return changed


def _fields(found: Any) -> dict[Any, Any] | None:
    """Return the named entries of an output; None if it has no names."""
    if isinstance(found, Mapping):
        return dict(found)
    if isinstance(found, tuple) and hasattr(found, "_asdict"):
        return dict(found._asdict())
    if dataclasses.is_dataclass(found) and not isinstance(found, type):
        return {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
    if isinstance(found, (tuple, list, Tensor)) or not hasattr(found, "__dict__"):
        return None
    return dict(vars(found))


def described(value: Any) -> str:
    """Describe what a model or a loader returned: type, keys, and types and shapes of the parts."""
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)}"
    fields = _fields(value)
    parts: Iterator[str]
    if fields:
        parts = (f"{key!s:.40}: {_short(part)}" for key, part in fields.items())
        kind, count = f"{type(value).__name__} with", len(fields)
    elif isinstance(value, (tuple, list)):
        parts = map(_short, value)
        kind, count = f"{type(value).__name__} of length {len(value)}:", len(value)
    else:
        return type(value).__name__
    shown = [part for part, _ in zip(parts, range(_SHOWN), strict=False)]
    rest = f" and {count - len(shown)} more" if count > len(shown) else ""
    return f"{kind} {', '.join(shown)}{rest}" if shown else kind.rstrip(":")


def _short(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"tensor {list(value.shape)}"
    if isinstance(value, (tuple, list)):
        return f"{type(value).__name__} of length {len(value)}"
    return type(value).__name__
