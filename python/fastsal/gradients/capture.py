"""Sees every use of a tracked weight while a forward pass runs."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastsal.errors import UnsupportedLayer
from fastsal.gradients.rules.registry import (
    REGISTRY,
    Call,
    Operation,
    RefusedCallError,
    UnreadCallError,
)

# on_call(name, operation, call, output) -> the output that the model goes on with
OnCall = Callable[[str, Operation, Call, Tensor], Tensor]


class Capture(TorchFunctionMode):
    """Hands supported calls on tracked weights to `on_call` and notes every other use.

    Attributes:
        unsupported: Parameter name to the reason why its uses have no rule.
    """

    def __init__(self, tracked: Mapping[str, Tensor], on_call: OnCall) -> None:
        super().__init__()
        self._names = {id(value): name for name, value in tracked.items()}
        self._on_call = on_call
        self.unsupported: dict[str, str] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types_: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run one torch function and look at its arguments."""
        del types_
        kwargs = dict(kwargs or {})
        names = self._tracked_among(args, kwargs)
        if not names:
            return func(*args, **kwargs)
        operation = REGISTRY.get(func)
        if operation is not None:
            return self._run(operation, names, func, args, kwargs)
        body = _open(func)
        if body is not None:
            # A composite such as multi_head_attention_forward: look at the calls inside.
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
                    other, f"used by {operation.name} as another argument than the weight"
                )
        # Without grad mode the output cannot reach the loss; a rule has nothing to do.
        if name is None or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        try:
            # Before the call, as what is refused may change the weight.
            call = operation.parse(*args, **kwargs)
        except RefusedCallError as reason:
            raise UnsupportedLayer(f"{name}: {reason}") from None
        except UnreadCallError as reason:
            self.unsupported.setdefault(name, str(reason))
            return func(*args, **kwargs)
        return self._on_call(name, operation, call, func(*args, **kwargs))


def _tensors(result: Any) -> Iterator[Tensor]:
    items = result if isinstance(result, (list, tuple)) else (result,)
    return (item for item in items if isinstance(item, Tensor))


_OPENED: dict[Callable[..., Any], Callable[..., Any]] = {}


def _open(func: Callable[..., Any]) -> Callable[..., Any] | None:
    """Copy a function of `torch.nn.functional` so that its body runs while a mode is active.

    Such a function first asks `has_torch_function` and would be sent back to the mode for ever;
    in the copy the answer is no, and the calls in its body are seen one by one.
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
    """Start the graph at a tensor that nothing before it needs gradients of."""
    # The clone is no leaf, so that the model may change it in place.
    return output.detach().requires_grad_().clone()


def hookable(output: Tensor) -> Tensor:
    """Return the tensor whose gradient hook survives a later in-place operation on `output`.

    An in-place operation on a view rewires the graph around the view's own node; a hook on its
    base stays where it is.
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
    """Say whether saved tensors are packed now, as by `torch.utils.checkpoint`."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is not None and top(True) is not None
