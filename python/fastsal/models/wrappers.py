"""Wrappers of models: the model inside, and the segments that wrappers add to names.

A wrapper passes every call on to one model: `DataParallel`, `DistributedDataParallel`,
`torch.compile`, averages of weights (PyTorch, timm), Lightning Fabric, DeepSpeed. It is recognized
by its class or its attributes, so that the library it comes from is never imported. Functions that
read names, heads or features use the model inside; training calls the wrapper.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import TypeVar

from torch import nn

_Value = TypeVar("_Value")

# Attributes of the model inside that only wrappers have: torch.compile, Lightning Fabric.
_INSIDE = ("_orig_mod", "_original_module")
# Classes whose `module` is the model inside, of PyTorch, Apex and DeepSpeed.
_WRAPPERS = frozenset({"DataParallel", "DistributedDataParallel", "DeepSpeedEngine"})
# Attributes of an average of weights, in PyTorch or elsewhere; `update` is a method.
_AVERAGES = (("n_averaged", "update_parameters"), ("decay", "update"))
# Attributes that hold the averaged model: in PyTorch and timm, and in timm's first version.
_AVERAGED = ("module", "ema")

_SEGMENTS = (
    "module", "_orig_mod", "_forward_module", "_original_module", "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
)  # fmt: skip
_LEADING = re.compile(rf"(?:(?:{'|'.join(_SEGMENTS)})\.)*")
_ANYWHERE = re.compile(rf"(?<![^.])(?:{'|'.join(_SEGMENTS)})\.")


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside all wrappers; the model itself if it is not wrapped.

    A module of the user that changes inputs or outputs is not a wrapper, whatever its attributes
    are called.
    """
    inner = _inside(model)
    return model if inner is None or inner is model else unwrapped(inner)


def _inside(wrapper: object) -> nn.Module | None:
    found = [getattr(wrapper, name, None) for name in _INSIDE if _has(wrapper, name)]
    if any(cls.__name__ in _WRAPPERS for cls in type(wrapper).__mro__):
        found.append(getattr(wrapper, "module", None))
    if any(all(hasattr(wrapper, name) for name in names) for names in _AVERAGES):
        averages = [getattr(wrapper, name) for name in _AVERAGED if _has(wrapper, name)]
        found += [each for each in averages if _is_all(each, wrapper)]
    return next((each for each in found if isinstance(each, nn.Module)), None)


def _is_all(inner: object, wrapper: object) -> bool:
    """Whether a module has no parameters but those of the model inside; a student has others."""
    if not isinstance(inner, nn.Module) or not isinstance(wrapper, nn.Module):
        return True
    return set(inner.parameters()) == set(wrapper.parameters())


def _has(wrapper: object, name: str) -> bool:
    """Whether an attribute is of the object itself, not forwarded from the model inside."""
    own = wrapper.__dict__
    return name in own or name in own.get("_modules", ())


def plain_name(name: str) -> str:
    """Remove the segments that wrappers add from a name or a pattern."""
    return _ANYWHERE.sub("", name)


def renamed(names: Iterable[str], known: Collection[str]) -> dict[str, str]:
    """Map names to those of a model that differ from them only in segments of wrappers.

    Segments at the beginning are removed from all names, or added to all, in the way that matches
    most of them; if several do, in the way that changes least. So the names of a model that begin
    with `module.` themselves are not mistaken for those of a wrapper. Names that are not matched in
    this way are compared without any such segment, and mapped where the result is unambiguous.

    Args:
        names: Names of weights, of masks or in a file.
        known: Names of the model.

    Returns:
        `{name: name in known}` of the names that are matched.
    """
    names = list(names)
    owned = set(known)
    changes = [(removed, added) for removed in _leading(names) for added in _leading(owned)]
    found: dict[str, str] = {}
    for removed, added in sorted(changes, key=lambda change: sum(map(len, change))):
        matched = {
            name: added + name[len(removed) :]
            for name in names
            if name.startswith(removed) and added + name[len(removed) :] in owned
        }
        if len(matched) > len(found):
            found = matched
    left = [name for name in names if name not in found]
    free = {name: plain_name(name) for name in owned.difference(found.values())}
    counts, wanted = Counter(free.values()), Counter(map(plain_name, left))
    by_plain = {plain: name for name, plain in free.items() if counts[plain] == 1}
    for name in left:
        plain = plain_name(name)
        if plain in by_plain and wanted[plain] == 1:
            found[name] = by_plain[plain]
    return found


def with_names_of(named: Mapping[str, _Value], known: Collection[str]) -> dict[str, _Value]:
    """Return a mapping with its names as in a model, see `renamed`; unmatched names are kept."""
    names = renamed(named, known)
    others = {name: value for name, value in named.items() if name not in names}
    return {**others, **{new: named[name] for name, new in names.items()}}


def _leading(names: Iterable[str]) -> set[str]:
    """Return the segments of wrappers that names begin with, of every length, and `""`."""
    found = {""}
    for name in names:
        match = _LEADING.match(name)
        segments = match.group() if match else ""
        while segments not in found:
            found.add(segments)
            segments = segments[: segments[:-1].rfind(".") + 1]
    return found
