"""How a tensor follows from the results of earlier functions, to compute it again elsewhere.

The shortcut of a residual block is often a slice or a padded copy that a model computes after the
layers of the block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map


@dataclass(frozen=True)
class Result:
    """The result of a function of the forward pass.

    Attributes:
        number: Number of the function.
    """

    number: int


@dataclass(frozen=True)
class Expression:
    """A function of results and of values that are the same in every pass.

    Attributes:
        func: The function.
        args: Arguments; results and expressions in place of tensors of the pass.
        kwargs: Keyword arguments, in the same way.
    """

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def results_in(value: Any) -> Iterator[int]:
    """Yield the numbers of the functions whose results an expression needs."""
    for leaf in tree_leaves(value):
        if isinstance(leaf, Result):
            yield leaf.number
        elif isinstance(leaf, Expression):
            yield from results_in((leaf.args, leaf.kwargs))


def evaluated(value: Any, results: Mapping[int, Tensor]) -> Any:
    """Compute an expression from results of the present pass.

    Raises:
        KeyError: A result is missing.
    """

    def found(leaf: Any) -> Any:
        if isinstance(leaf, Result):
            return results[leaf.number]
        if isinstance(leaf, Expression):
            args, kwargs = tree_map(found, (leaf.args, leaf.kwargs))
            return leaf.func(*args, **kwargs)
        return leaf

    return found(value)
