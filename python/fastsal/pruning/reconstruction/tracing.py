"""Follow the layers of a model through one forward pass, and the sums that their outputs end in.

Axes: O outputs of a layer.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fastsal.gradients.capture import Interception
from fastsal.pruning.reconstruction.expressions import Expression, Result
from fastsal.utils.float64 import in_float64

_ADDITIONS = {torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__iadd__, Tensor.__radd__}
_PRODUCTS = {torch.mul, Tensor.mul, Tensor.mul_, Tensor.__mul__, Tensor.__imul__, Tensor.__rmul__}
# Arguments of `F.batch_norm`.
_OF_BATCH_NORM = (
    "input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps",
)  # fmt: skip
# Functions whose result has the values of their argument.
_IDENTITIES = {Tensor.contiguous, Tensor.to, Tensor.float, Tensor.clone, torch.clone}


@dataclass(frozen=True)
class Branch:
    """A tensor that is the output of a layer, up to a scale and a constant for each output.

    Attributes:
        name: Name of the weight.
        scale: `[O]`; None for one.
        is_output: Whether it is the output itself.
        axis: Axis of the outputs.
        shape: Shape of the output.
    """

    name: str
    scale: Tensor | None
    is_output: bool
    axis: int
    shape: torch.Size


class Trace(Interception):
    """Numbers the functions of a forward pass, and follows the outputs of layers.

    Args:
        tracked: Name to weight.
        buffers: Tensors of the model that are the same in every pass.

    Attributes:
        calls: Number of functions so far.
    """

    def __init__(self, tracked: Mapping[str, Tensor], buffers: Iterable[Tensor]) -> None:
        super().__init__(tracked)
        self.calls = 0
        self._constants = {id(buffer) for buffer in buffers}
        self._recipes: dict[int, Expression] = {}
        self._made: dict[int, tuple[int, weakref.ref[Tensor]]] = {}
        self._branches: dict[int, tuple[Branch, weakref.ref[Tensor]]] = {}
        self._started: dict[int, Branch] = {}

    def normalized(self, branch: Branch, running_mean: Tensor) -> None:
        """Note that the output of a layer is the input of a batch normalization."""

    def added(self, branch: Branch, other: Tensor) -> None:
        """Note that a branch is added to another tensor."""

    def made(self, number: int, result: Tensor) -> None:
        """Note the result of a function."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types_: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run one torch function and follow its result."""
        kwargs = dict(kwargs or {})
        if func in _ADDITIONS and len(args) >= 2 and all(isinstance(a, Tensor) for a in args[:2]):
            for one, other in ((args[0], args[1]), (args[1], args[0])):
                if (branch := self.branch_of(one)) and other.shape == branch.shape:
                    self.added(branch, other)
        below = self._follow(func, args, kwargs)
        recipe = self._recipe(func, args, kwargs)
        result = super().__torch_function__(func, types_, args, kwargs)
        self.calls += 1
        if isinstance(result, Tensor):
            if recipe is not None and not any(result is a for a in args):
                self._recipes[self.calls] = recipe
            self._made[id(result)] = self.calls, weakref.ref(result)
            self.made(self.calls, result)
            # A function that changes a branch in place, such as an activation, ends it.
            branch = self._started.pop(id(result), below)
            if branch is not None and result.shape == branch.shape:
                self._branches[id(result)] = branch, weakref.ref(result)
            else:
                self._branches.pop(id(result), None)
        return result

    def expression_of(self, tensor: Tensor, before: int) -> Result | Expression | None:
        """Return how a tensor follows from the results of the first functions of the pass.

        Args:
            tensor: A result of the pass.
            before: Number of these functions.

        Returns:
            None if it depends on a tracked weight in another way, or changes a tensor in place.
        """
        number = self.number_of(tensor)
        return None if number is None else self._expand(Result(number), before)

    def _expand(self, result: Result, before: int) -> Result | Expression | None:
        if result.number <= before:
            return result
        recipe = self._recipes.get(result.number)
        if recipe is None:
            return None
        missing = False

        def expanded(leaf: Any) -> Any:
            nonlocal missing
            if not isinstance(leaf, Result):
                return leaf
            found = self._expand(leaf, before)
            missing = missing or found is None
            return found

        args, kwargs = tree_map(expanded, (recipe.args, recipe.kwargs))
        return None if missing else Expression(recipe.func, args, kwargs)

    def _recipe(
        self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Expression | None:
        """Return a function call with the numbers of its arguments; None if it cannot be repeated.

        Tensors of the pass are not kept.
        """
        known = True

        def numbered(leaf: Any) -> Any:
            nonlocal known
            if not isinstance(leaf, Tensor) or isinstance(leaf, nn.Parameter):
                known = known and id(leaf) not in self._names
                return leaf
            number = self.number_of(leaf)
            if number is not None:
                return Result(number)
            known = known and id(leaf) in self._constants
            return leaf

        found = Expression(func, *tree_map(numbered, (tuple(args), dict(kwargs))))
        return found if known else None

    def start(self, name: str, operation: str, output: Tensor) -> None:
        """Follow the output of a layer, before the function that computes it returns."""
        axis = output.ndim - 1 if operation == "linear" else 1
        self._started = {id(output): Branch(name, None, True, axis, output.shape)}

    def branch_of(self, tensor: object) -> Branch | None:
        """Return the branch that a tensor is, or None."""
        branch, alive = self._branches.get(id(tensor), (None, None))
        return branch if alive is not None and alive() is tensor else None

    def number_of(self, tensor: Tensor) -> int | None:
        """Return the number of the function that returned a tensor, or None."""
        number, alive = self._made.get(id(tensor), (None, None))
        return number if alive is not None and alive() is tensor else None

    def _follow(
        self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Branch | None:
        """Return the branch that the result of a function is, or None."""
        branch = self.branch_of(args[0]) if args else None
        if branch is None:
            return None
        if func in _IDENTITIES:
            return branch
        if func is F.dropout:
            given = dict(zip(("input", "p", "training"), args, strict=False)) | dict(kwargs)
            return branch if not given.get("training", True) else None
        if func is F.batch_norm:
            return self._normalize(branch, args, kwargs)
        if func in _PRODUCTS and len(args) >= 2 and isinstance(args[1], Tensor):
            return _scaled(branch, _per_output(branch, args[1]))
        return None

    def _normalize(
        self, branch: Branch, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Branch | None:
        given = dict(zip(_OF_BATCH_NORM, args, strict=False)) | dict(kwargs)
        mean, variance, weight = (given.get(n) for n in ("running_mean", "running_var", "weight"))
        if given.get("training", False) or mean is None or variance is None or branch.axis != 1:
            return None
        if branch.is_output:
            self.normalized(branch, mean)
        scale = (variance + given.get("eps", 1e-5)).rsqrt()
        return _scaled(branch, scale if weight is None else scale * weight)


def _scaled(branch: Branch, factor: Tensor | None) -> Branch | None:
    if factor is None:
        return None
    factor = in_float64(factor.detach())
    scale = factor if branch.scale is None else branch.scale * factor
    return Branch(branch.name, scale, False, branch.axis, branch.shape)


def _per_output(branch: Branch, factor: Tensor) -> Tensor | None:
    """Return a factor as `[O]` if it is one number for each output, else None."""
    axis = branch.axis
    wide = [1] * len(branch.shape)
    wide[axis] = branch.shape[axis]
    aligned = (1,) * (len(branch.shape) - factor.ndim) + tuple(factor.shape)
    if aligned == (1,) * len(branch.shape):
        return factor.reshape(1).expand(branch.shape[axis])
    return factor.reshape(-1) if aligned == tuple(wide) else None
