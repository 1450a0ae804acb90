"""How a tensor follows from the results of earlier functions, to compute it again elsewhere.

The shortcut of a residual block is often a slice or a padded copy that a model computes after the
layers of the block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor


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
    kwargs: Mapping[str, Any]


def replaced(value: Any, change: Callable[[Any], Any]) -> Any:
    """Return a nested argument in which every leaf is changed."""
    if isinstance(value, (tuple, list)):
        changed = [replaced(item, change) for item in value]
        return type(value)(changed) if type(value) in (tuple, list) else tuple(changed)
    if isinstance(value, dict):
        return {key: replaced(item, change) for key, item in value.items()}
    return change(value)


def results_in(value: Any) -> Iterator[int]:
    """Yield the numbers of the functions whose results an expression needs."""
    if isinstance(value, Result):
        yield value.number
    elif isinstance(value, Expression):
        yield from results_in([*value.args, *value.kwargs.values()])
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from results_in(item)
    elif isinstance(value, dict):
        yield from results_in(list(value.values()))


def evaluated(value: Any, results: Mapping[int, Tensor]) -> Any:
    """Compute an expression from results of the present pass.

    Raises:
        KeyError: A result is missing.
    """

    def found(leaf: Any) -> Any:
        if isinstance(leaf, Result):
            return results[leaf.number]
        if isinstance(leaf, Expression):
            args, kwargs = replaced(leaf.args, found), replaced(dict(leaf.kwargs), found)
            return leaf.func(*args, **kwargs)
        return leaf

    return found(value)
