"""How much memory tensors hold at once while something runs."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the storages that operations make, inside a `with` block, and the most alive at once.

    It sees every operation of PyTorch, those of a backward pass too, on any device (also "meta",
    where nothing is computed); not what a kernel needs inside of itself, and not what was there
    before.

    Attributes:
        alive: Bytes that are held now.
        peak: The most that were.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.alive = 0
        self.peak = 0
        self._seen: dict[int, weakref.ref[Any]] = {}

    def reset(self) -> None:
        """Begin a new peak at what is alive now."""
        self.peak = self.alive

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        known = {
            t.untyped_storage()._cdata
            for t in tree_leaves((args, kwargs))
            if isinstance(t, Tensor) and _has_storage(t)
        }
        out = func(*args, **kwargs)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and _has_storage(tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in known:
                    self._add(storage)
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        before = self._seen.get(key)
        if before is not None and before() is not None:
            return
        nbytes = storage.nbytes()

        def gone(_: Any) -> None:
            self.alive -= nbytes
            self._seen.pop(key, None)

        self._seen[key] = weakref.ref(storage, gone)
        self.alive += nbytes
        self.peak = max(self.peak, self.alive)


def _has_storage(tensor: Tensor) -> bool:
    try:
        tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):  # sparse, or a subclass without one
        return False
    return True


def trim_heap() -> None:
    """Give free memory of the C library's heap back to the system, where that can be asked for."""
    import ctypes

    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
