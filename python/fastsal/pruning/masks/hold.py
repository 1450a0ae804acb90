"""Keep pruned weights at zero during training: weights, gradients and optimizer state.

A pruned weight can become nonzero in four ways, each of which is prevented where it happens:

- Its gradient is not zero: a hook on the parameter zeroes it before it is accumulated, clipped,
  unscaled or sent to other processes.
- The optimizer updates it anyway, because of earlier momentum, of a rule that mixes weights, or of
  NaN: optimizer state is zeroed at the start of the block, weights before and after every step.
- Other values are loaded into it or into the optimizer state: they are zeroed after loading.
- It is copied before it is zero: the model is masked at the start of the block.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastsal.errors import InvalidArgument, MaskError
from fastsal.utils.interrupts import uninterrupted

# Attributes of wrappers of optimizers with the optimizer inside: accelerate, Lightning and others;
# timm and others.
_INNER = ("optimizer", "_optimizer", "base_optimizer", "_base_optimizer")
# Attributes of optimizers with the hooks that are used; a wrapper may have some or none of them.
_HOOKS = (
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_load_state_dict_post_hooks",
)

# Parameter to boolean tensor of its shape, on its device, True = pruned.
Pruned = Mapping[nn.Parameter, Tensor]


@contextlib.contextmanager
def hold(
    pruned: Pruned,
    model: nn.Module,
    optimizer: Optimizer | Iterable[Optimizer] | None,
    verify: Callable[[], None],
) -> Iterator[None]:
    """Keep pruned weights zero inside the block; `Masks.hold` is the public form of it.

    Args:
        pruned: Inverted masks.
        model: The model, or a wrapper of it.
        optimizer: Optimizers of the masked parameters, or None.
        verify: Raises MaskError if a pruned weight is not zero; called at the end of the block.
    """
    optimizers = _checked(optimizer, pruned)

    def before_step(*_: object) -> None:
        # Assigned gradients bypass the hook; weight decay would move a weight into momentum.
        _zero_weights(pruned)
        _zero_gradients(pruned)

    with contextlib.ExitStack() as hooks:
        before_step()
        for p, where in pruned.items():
            if p.requires_grad:
                hooks.enter_context(_held_gradient(p, where))
        for module in model.modules():
            own = {n: pruned[p] for n, p in module.named_parameters(recurse=False) if p in pruned}
            if own:
                handle = module.register_load_state_dict_post_hook(  # type: ignore[no-untyped-call]
                    _AfterLoading(own)
                )
                hooks.callback(handle.remove)
        for each in optimizers:
            _zero_state(pruned, each)
            for handle in (
                each.register_step_pre_hook(before_step),
                each.register_step_post_hook(lambda *_: _zero_weights(pruned)),
                each.register_load_state_dict_post_hook(partial(_zero_state, pruned)),
            ):
                hooks.callback(handle.remove)
        try:
            yield
            _verify(verify)
        finally:
            # An interrupted step may have changed them.
            _zero_weights(pruned)


class _AfterLoading:
    """Zeroes pruned weights of a module after a state dict was loaded into it.

    A copied or pickled module gets a hook that does nothing, as the copy is not held.
    """

    def __init__(self, pruned: Mapping[str, Tensor] | None = None) -> None:
        self._pruned = pruned or {}

    def __call__(self, module: nn.Module, _keys: object) -> None:
        for name, where in self._pruned.items():
            _zero(module.get_parameter(name), where)

    def __reduce__(self) -> tuple[type[_AfterLoading], tuple[()]]:
        return _AfterLoading, ()


def _checked(optimizer: Optimizer | Iterable[Optimizer] | None, pruned: Pruned) -> list[Optimizer]:
    """Return the optimizers whose `step` calls hooks."""
    if optimizer is None:
        return []
    several = isinstance(optimizer, Iterable)
    given: list[Any] = list(optimizer) if several else [optimizer]  # type: ignore[arg-type]
    for each in given:
        if not isinstance(_with_inner(each)[-1], Optimizer):
            raise InvalidArgument(
                "optimizer must be a torch.optim.Optimizer, several of them, or None, got "
                f"{type(each).__name__}"
            )
    stepping = [each for outer in given for each in _with_inner(outer)]
    groups = (group for each in stepping for group in each.param_groups)
    if not any(p in pruned for group in groups for p in group["params"]):
        raise InvalidArgument(
            "optimizer must hold the masked parameters (that is, train this model) or be None; it "
            "holds none of them"
        )
    return stepping


def _with_inner(optimizer: Any) -> list[Any]:
    """Return an optimizer and those inside it, if they call hooks; the innermost one in any case.

    A wrapper may step the optimizer inside by itself (Lookahead of timm, `accelerate`), may be
    stepped as a whole, or both (sharpness-aware minimization); the state may be of either.
    """
    chain = [optimizer]
    while inner := [
        each
        for name in _INNER
        if isinstance(each := getattr(chain[-1], name, None), Optimizer)
        and all(each is not known for known in chain)
    ]:
        chain.append(inner[0])
    # Some pass attributes on to the optimizer inside, whose hooks they then seem to have.
    hooked = [each for each in chain[:-1] if all(name in vars(each) for name in _HOOKS)]
    return [*hooked, chain[-1]]


@contextlib.contextmanager
def _held_gradient(p: nn.Parameter, where: Tensor) -> Iterator[None]:
    def without_pruned(gradient: Tensor) -> Tensor:
        # Not a product: zero times infinity is not zero.
        return gradient.masked_fill(where.to(gradient.device), 0)

    handle = p.register_hook(without_pruned)  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        with uninterrupted():
            handle.remove()
            if not p._backward_hooks:
                p._backward_hooks = None  # an empty dict would still be read by autograd


def _verify(verify: Callable[[], None]) -> None:
    try:
        verify()
    except MaskError as error:
        raise MaskError(
            f"{error}; inside hold, only the given optimizers and load_state_dict may change the "
            "model"
        ) from error


def _zero_weights(pruned: Pruned) -> None:
    for p, where in pruned.items():
        _zero(p, where)


def _zero_gradients(pruned: Pruned) -> None:
    for p, where in pruned.items():
        if p.grad is not None:
            _zero(p.grad, where)


def _zero_state(pruned: Pruned, optimizer: Optimizer) -> None:
    """Zero momentum, moments and averages: every state tensor of the parameter's shape."""
    for p, where in pruned.items():
        for value in optimizer.state.get(p, {}).values():
            if isinstance(value, Tensor) and value.shape == p.shape:
                _zero(value, where)


def _zero(tensor: Tensor, where: Tensor) -> None:
    with torch.no_grad():
        # The device differs only if the model was moved inside the block.
        tensor.masked_fill_(where.to(tensor.device), 0)
