"""Digests of functions and objects that are the same in every process, for checkpoints and caches.

A function is known by its name, its code, and the values that it refers to; an object by its class
and its attributes. What they themselves change, such as a counter of calls, is left out. Functions
and classes of installed packages are known by name.
"""

from __future__ import annotations

import dis
import functools
import inspect
import re
import sys
from collections.abc import Collection, Iterable, Mapping
from pathlib import PurePath
from types import CodeType, FunctionType, MethodType
from typing import Any

from fastsal.utils.digests import Digest

_STORES = frozenset({"STORE_DEREF", "STORE_GLOBAL", "STORE_ATTR"})
# Methods that change a container.
_CHANGES = frozenset(
    {"append", "extend", "insert", "pop", "remove", "clear", "add", "discard", "update",
     "setdefault", "popitem", "appendleft"}
)  # fmt: skip


def identity_of(value: Any) -> str:
    """Return a text that identifies a value: a plain value as it is, a function by a digest."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return str(value)
    digest = Digest()
    _Reader(digest).add(value)
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__} {digest.hexdigest()[:16]}"


class _Reader:
    """Adds values, and what they refer to, to a digest; each object once."""

    def __init__(self, digest: Digest) -> None:
        self._digest = digest
        self._seen: dict[int, Any] = {}  # keeps them alive, so that no id is used again

    def add(self, value: Any) -> None:
        """Add a value."""
        import numpy as np
        import torch

        self._digest.text(f"\0{type(value).__module__}.{type(value).__qualname__}\0")
        if value is None or isinstance(value, (bool, int, float, complex, str, bytes, PurePath)):
            self._digest.text(repr(value))
            return
        if not isinstance(value, (tuple, frozenset, CodeType)):  # equal constants may be one object
            if id(value) in self._seen:
                return
            self._seen[id(value)] = value
        if isinstance(value, torch.Tensor):
            self._digest.tensor("", value)
        elif isinstance(value, np.ndarray) and not value.dtype.hasobject:
            self._digest.text(f"{value.dtype} {value.shape}").array(value)
        elif isinstance(value, (list, tuple, set, frozenset, Mapping)):
            self._add_container(value)
        else:
            self._add_object(value)

    def _add_container(self, value: Any) -> None:
        if isinstance(value, (set, frozenset)):
            value = sorted(map(_plain_text, value))  # their order differs between processes
        elif isinstance(value, Mapping):
            value = [part for item in value.items() for part in item]
        self._digest.text(str(len(value)))
        for part in value:
            self.add(part)

    def _add_object(self, value: Any) -> None:
        """Add a function, a class or any other object."""
        import torch

        if isinstance(value, functools.partial):
            self.add((value.func, value.args, value.keywords))
        elif isinstance(value, MethodType):
            self.add((value.__func__, value.__self__))
        elif isinstance(value, CodeType):
            self.add((value.co_code, value.co_consts, value.co_names))
        elif isinstance(value, FunctionType):
            self._add_function(value)
        elif isinstance(value, torch.nn.Module):
            self._digest.text(_plain_text(value))
            self.add({**dict(value.named_parameters()), **dict(value.named_buffers())})
            self._add_attributes(value)
        elif not hasattr(value, "__name__"):  # other than classes, modules and built-in functions
            self._add_attributes(value)
        else:
            self._digest.text(f"{getattr(value, '__module__', '')}.{value.__name__}")

    def _add_function(self, function: FunctionType) -> None:
        """Add a function: its name, its code, its defaults, and the values that it refers to."""
        self._digest.text(f"{function.__module__}.{function.__qualname__}")
        if _is_installed(function.__module__):
            return
        code = function.__code__
        self.add((code, function.__defaults__, function.__kwdefaults__))
        found = inspect.getclosurevars(function)
        changed, changes = _changed_by([code])
        self._add_named({**found.nonlocals, **found.globals}, changed, changes)

    def _add_attributes(self, value: Any) -> None:
        """Add the functions of the class of an object, and the attributes that they leave alone."""
        kind = type(value)
        functions = {n: f for n, f in vars(kind).items() if isinstance(f, FunctionType)}
        if not _is_installed(kind.__module__):
            self._add_named(functions)
        later = [f.__code__ for n, f in functions.items() if n not in ("__init__", "__post_init__")]
        attributes = dict(getattr(value, "__dict__", {}))
        if "_forward_hooks" in attributes:  # of a module, whose tensors and modules were added
            attributes = {n: v for n, v in attributes.items() if not n.startswith("_")}
        self._add_named(attributes, *_changed_by(later))

    def _add_named(
        self, values: Mapping[str, Any], changed: Collection[str] = (), changes: bool = False
    ) -> None:
        """Add values but those in `changed` and, with `changes`, containers that may change."""
        for name, value in sorted(values.items(), key=lambda item: item[0]):
            if name not in changed and not (changes and isinstance(value, (list, dict, set))):
                self.add((name, value))


def _plain_text(value: Any) -> str:
    """Return the text of a value without the addresses of objects."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", str(value))


def _changed_by(codes: Iterable[CodeType]) -> tuple[set[str], bool]:
    """Return the names that code assigns to, and whether it may change a container."""
    changed: set[str] = set()
    changes = False
    for code in codes:
        for step in dis.get_instructions(code):
            if step.opname in _STORES:
                changed.add(str(step.argval))
            changes |= step.opname in ("STORE_SUBSCR", "DELETE_SUBSCR")
        changes |= not _CHANGES.isdisjoint(code.co_names)
        inner, more = _changed_by(c for c in code.co_consts if isinstance(c, CodeType))
        changed |= inner
        changes |= more
    return changed, changes


def _is_installed(module: str | None) -> bool:
    """Whether a module is built in, or of an installed package."""
    found = sys.modules.get(module or "builtins")
    file = getattr(found, "__file__", None)
    return module == "builtins" or (file is not None and "site-packages" in file)
