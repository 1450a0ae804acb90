"""Zeros that stay zero while a model is trained: weights, gradients and what optimisers remember.

A zero weight is lost in one of four ways, and each is closed where it happens:

- its gradient is not zero: a hook of the parameter fills it with zero before it is accumulated,
  clipped, unscaled or sent to other processes;
- the optimiser moves it anyway, by momentum from before, by a rule that mixes weights, or because
  it is NaN: state is zeroed when the block begins, weights before and after every step;
- other values are loaded over it, or over the optimiser's state: they are zeroed after loading;
- it is copied before it is zero: the model is masked when the block begins.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastsal.errors import InvalidArgument, MaskError

if TYPE_CHECKING:
    from fastsal.pruning.masks.masks import Masks

# Parameter to boolean tensor of its shape, on its device, True = pruned.
Pruned = Mapping[nn.Parameter, Tensor]


@contextlib.contextmanager
def hold(
    masks: Masks, model: nn.Module, optimizer: Optimizer | Iterable[Optimizer] | None = None
) -> Iterator[None]:
    """Keep pruned weights zero inside the block; see `Masks.hold`, which is how it is called."""
    pruned = _pruned(masks, model)
    optimizers = _checked(optimizer, pruned)

    def before_step(*_: object) -> None:
        # What was assigned has passed no hook; decay would carry a weight into momentum.
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
            _prove(masks, model)
        finally:
            # A step that was interrupted may have moved them.
            _zero_weights(pruned)


class _AfterLoading:
    """Zeroes pruned weights of a module that a state dict was loaded into.

    A copy of the module, or a file that it is pickled to, gets a hook that does nothing: it is
    no part of the block.
    """

    def __init__(self, pruned: Mapping[str, Tensor] | None = None) -> None:
        self._pruned = pruned or {}

    def __call__(self, module: nn.Module, _keys: object) -> None:
        for name, where in self._pruned.items():
            _zero(module.get_parameter(name), where)

    def __reduce__(self) -> tuple[type[_AfterLoading], tuple[()]]:
        return _AfterLoading, ()


def _pruned(masks: Masks, model: nn.Module) -> Pruned:
    """Invert the masks; a parameter with two names is pruned where either mask says so."""
    pruned: dict[nn.Parameter, Tensor] = {}
    for name, p in masks.parameters(model).items():
        where = ~masks[name].to(p.device)
        pruned[p] = pruned[p] | where if p in pruned else where
    return pruned


def _checked(optimizer: Optimizer | Iterable[Optimizer] | None, pruned: Pruned) -> list[Optimizer]:
    """Return the optimisers whose `step` has hooks."""
    if optimizer is None:
        return []
    several = isinstance(optimizer, Iterable)
    given: list[Any] = list(optimizer) if several else [optimizer]  # type: ignore[arg-type]
    for each in given:
        if not isinstance(each, Optimizer):
            raise InvalidArgument(
                f"optimizer: got {type(each).__name__}; takes a torch.optim.Optimizer, several of "
                "them, or None"
            )
    # timm's Lookahead never calls hooks; the optimiser that it wraps does, and keeps its state.
    stepping: list[Optimizer] = [getattr(each, "_base_optimizer", each) for each in given]
    groups = (group for each in stepping for group in each.param_groups)
    if not any(p in pruned for group in groups for p in group["params"]):
        raise InvalidArgument(
            "optimizer: holds none of the masked parameters; takes the one that trains this "
            "model, or None"
        )
    return stepping


@contextlib.contextmanager
def _held_gradient(p: nn.Parameter, where: Tensor) -> Iterator[None]:
    def without_pruned(gradient: Tensor) -> Tensor:
        # Not a product: zero times infinity is not zero.
        return gradient.masked_fill(where.to(gradient.device), 0)

    handle = p.register_hook(without_pruned)  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        handle.remove()
        if not p._backward_hooks:
            p._backward_hooks = None  # not an empty dict, which autograd would go on asking


def _prove(masks: Masks, model: nn.Module) -> None:
    try:
        masks.verify(model)
    except MaskError as error:
        raise MaskError(
            f"{error}; inside hold the model was changed by something other than the given "
            "optimizers and load_state_dict"
        ) from error


def _zero_weights(pruned: Pruned) -> None:
    for p, where in pruned.items():
        _zero(p, where)


def _zero_gradients(pruned: Pruned) -> None:
    for p, where in pruned.items():
        if p.grad is not None:
            _zero(p.grad, where)


def _zero_state(pruned: Pruned, optimizer: Optimizer) -> None:
    """Zero momentum, moments and averages: every tensor of state with the parameter's shape."""
    for p, where in pruned.items():
        for value in optimizer.state.get(p, {}).values():
            if isinstance(value, Tensor) and value.shape == p.shape:
                _zero(value, where)


def _zero(tensor: Tensor, where: Tensor) -> None:
    with torch.no_grad():
        # The device is another one only if the model was moved inside the block.
        tensor.masked_fill_(where.to(tensor.device), 0)
