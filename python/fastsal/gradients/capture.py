"""Interception of every use of a tracked weight during a forward pass."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastsal.errors import UnsupportedLayer
from fastsal.gradients.rules.operations import (
    OPERATIONS,
    Call,
    Operation,
    RefusedCallError,
    UnreadCallError,
)

# on_call(name, operation, call, output) -> the output that the model continues with
OnCall = Callable[[str, Operation, Call, Tensor], Tensor]


class Interception(TorchFunctionMode):
    """Passes supported calls on tracked weights to `around` and records every other use.

    Attributes:
        unsupported: Parameter name to the reason why no rule supports its uses.
    """

    def __init__(self, tracked: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._names = {id(value): name for name, value in tracked.items()}
        self.unsupported: dict[str, str] = {}

    def around(
        self, name: str, operation: Operation, call: Call, run: Callable[[], Tensor]
    ) -> Tensor:
        """Return the output that the model continues with, such as `run()`."""
        raise NotImplementedError

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types_: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run one torch function and inspect its arguments."""
        del types_
        kwargs = dict(kwargs or {})
        names = self._tracked_among(args, kwargs)
        if not names:
            return func(*args, **kwargs)
        operation = OPERATIONS.get(func)
        if operation is not None:
            return self._run(operation, names, func, args, kwargs)
        body = _open(func)
        if body is not None:
            # A composite such as multi_head_attention_forward: intercept the calls inside.
            with self:
                return body(*args, **kwargs)
        result = func(*args, **kwargs)
        if any(id(value) not in self._names for value in _tensors(result)):
            label = getattr(func, "__name__", str(func))
            for name in names:
                self.unsupported.setdefault(name, f"used by {label}, which has no rule")
        return result

    def _tracked_among(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[str]:
        found = []
        for value in (*args, *kwargs.values()):
            for item in value if isinstance(value, (list, tuple)) else (value,):
                name = self._names.get(id(item))
                if name is not None:
                    found.append(name)
        return found

    def _run(
        self,
        operation: Operation,
        names: list[str],
        func: Callable[..., Any],
        args: Sequence[Any],
        kwargs: dict[str, Any],
    ) -> Any:
        weight = operation.weight_of(*args, **kwargs)
        name = self._names.get(id(weight))
        for other in names:
            if other != name:
                self.unsupported.setdefault(
                    other, f"used by {operation.name} as an argument other than the weight"
                )
        if name is None or not self._follows():
            return func(*args, **kwargs)
        try:
            # Before the call, because a refused call may change the weight.
            call = operation.parse(*args, **kwargs)
        except RefusedCallError as reason:
            raise UnsupportedLayer(f"{name}: {reason}") from None
        except UnreadCallError as reason:
            self.unsupported.setdefault(name, str(reason))
            return func(*args, **kwargs)
        return self.around(name, operation, call, lambda: func(*args, **kwargs))

    def _follows(self) -> bool:
        """Whether calls are passed on now."""
        return True


class Capture(Interception):
    """Passes the outputs of supported calls on tracked weights to `on_call`."""

    def __init__(self, tracked: Mapping[str, Tensor], on_call: OnCall) -> None:
        super().__init__(tracked)
        self._on_call = on_call

    def around(
        self, name: str, operation: Operation, call: Call, run: Callable[[], Tensor]
    ) -> Tensor:
        """Return what `on_call` returns for the output."""
        return self._on_call(name, operation, call, run())

    def _follows(self) -> bool:
        # Without grad mode the output does not affect the loss.
        return torch.is_grad_enabled()


def _tensors(result: Any) -> Iterator[Tensor]:
    items = result if isinstance(result, (list, tuple)) else (result,)
    return (item for item in items if isinstance(item, Tensor))


_OPENED: dict[Callable[..., Any], Callable[..., Any]] = {}


def _open(func: Callable[..., Any]) -> Callable[..., Any] | None:
    """Copy a function of `torch.nn.functional` so that the mode intercepts the calls in its body.

    The original tests `has_torch_function` first and would dispatch to the mode forever; in the
    copy the test is always false.
    """
    if func not in _OPENED:
        if not isinstance(func, types.FunctionType) or func.__module__ != "torch.nn.functional":
            return None
        scope = dict(func.__globals__)
        for question in (
            "has_torch_function",
            "has_torch_function_unary",
            "has_torch_function_variadic",
        ):
            scope[question] = _never
        copy = types.FunctionType(
            func.__code__, scope, func.__name__, func.__defaults__, func.__closure__
        )
        copy.__kwdefaults__ = func.__kwdefaults__
        _OPENED[func] = copy
    return _OPENED[func]


def _never(*relevant: Any) -> bool:
    del relevant
    return False


def make_root(output: Tensor) -> Tensor:
    """Start the graph at a tensor that has no graph yet."""
    # The clone is not a leaf, so that the model may modify it in place.
    return output.detach().requires_grad_().clone()


def hookable(output: Tensor) -> Tensor:
    """Return the tensor whose gradient hook survives a later in-place operation on `output`.

    An in-place operation on a view replaces the node of the view in the graph, but not that of its
    base.
    """
    base = output._base
    if (
        base is not None
        and base.requires_grad
        and base.numel() == output.numel()
        and base.is_contiguous()
        and output.is_contiguous()
    ):
        return base
    return output


def saves_tensors_elsewhere() -> bool:
    """Whether hooks on saved tensors are active, as inside `torch.utils.checkpoint`."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is not None and top(True) is not None
