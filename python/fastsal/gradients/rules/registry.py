"""One rule per operation, all with the signature of `Rule`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastsal.gradients.workspace import Workspace


@dataclass(frozen=True)
class Call:
    """What a rule needs to know of one call of an operation on a tracked weight.

    Attributes:
        op: Name of the operation, `"linear"`, `"conv2d"` or `"embedding"`.
        input: Input of the operation, `[n·r, ...]`; tokens stay integers.
        weight_shape: Shape of the weight, `[O, ...]`.
        stride: Stride per spatial axis.
        padding: Padding `(before, after)` per spatial axis.
        dilation: Dilation per spatial axis.
        groups: Number of groups G.
        ignored_index: Row of a table that has no gradient.
        samples_first: Whether samples are the outermost axis, `[n, L, C]` or `[n·L, C]`; if not,
            they are the innermost of the leading axes, `[L, n, C]` or `[L·n, C]`.
    """

    op: str
    input: Tensor
    weight_shape: tuple[int, ...]
    stride: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    ignored_index: int | None = None
    samples_first: bool = True


class UnreadCallError(Exception):
    """A call has a form that its rule does not cover; the text is the reason for the fallback."""


class RefusedCallError(Exception):
    """A call has no gradients of single samples; the text says why and what to do."""


# rule(call, grad_output, out, workspace): fills `out` [n, *weight_shape] with the gradient of
# each sample. Floating point arrives in the dtype of `out`; `workspace` lends scratch memory.
Rule = Callable[[Call, Tensor, Tensor, Workspace], None]


@dataclass(frozen=True)
class Operation:
    """How calls of one function are read, and the rule for them.

    Attributes:
        name: Name shown in `GradientEngine.plan`.
        weight_of: Takes the arguments of the function, returns the weight.
        parse: Takes the arguments of the function, returns the `Call`.
        rule: The rule.
        any_layout: Whether the rule takes calls that are not `samples_first`.
    """

    name: str
    weight_of: Callable[..., Any]
    parse: Callable[..., Call]
    rule: Rule
    any_layout: bool = False


REGISTRY: dict[Callable[..., Any], Operation] = {}


def register(operation: Operation, *functions: Callable[..., Any]) -> None:
    """Use this operation for every call of these functions."""
    for function in functions:
        REGISTRY[function] = operation
