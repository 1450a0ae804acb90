"""Measurement of the memory of tensors that are alive at the same time."""

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
    """Measures the memory of the storages that operations create inside a `with` block.

    All operations of PyTorch are included, also those of a backward pass, on any device ("meta"
    too, which computes nothing). Temporary memory inside kernels and storages that existed before
    are not included.

    Attributes:
        alive: Bytes of the storages that are alive.
        peak: Maximum of `alive`.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.alive = 0
        self.peak = 0
        self._seen: dict[int, weakref.ref[Any]] = {}

    def reset(self) -> None:
        """Reset the peak to the current value."""
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
    """Return free heap memory of the C library to the system, if supported."""
    import ctypes

    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
