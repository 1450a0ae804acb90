"""The operations with a rule for per-sample gradients; every rule has the signature of `Rule`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastsal.gradients.workspace import Workspace


@dataclass(frozen=True)
class Call:
    """Arguments of one call of an operation on a tracked weight, as a rule needs them.

    Attributes:
        op: Name of the operation, for example "linear", "conv2d" or "embedding".
        input: Input of the operation, `[n·r, ...]`; token ids are integers.
        weight_shape: Shape of the weight, `[O, ...]`.
        stride: Stride per spatial axis.
        padding: Padding `(before, after)` per spatial axis.
        dilation: Dilation per spatial axis.
        groups: Number of groups G.
        ignored_index: Row of an embedding that has no gradient (`padding_idx`).
        samples_first: Whether samples are the outermost axis, `[n, L, C]` or `[n·L, C]`; otherwise
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
    """The rule does not support this form of call; the text is the reason for the fallback."""


class RefusedCallError(Exception):
    """The call has no per-sample gradients; the text explains why and what to change."""


# rule(call, grad_output, out, workspace) writes the gradient of each sample to `out`
# [n, *weight_shape]. Floating-point inputs have the dtype of `out`; `workspace` is scratch memory.
Rule = Callable[[Call, Tensor, Tensor, Workspace], None]


@dataclass(frozen=True)
class Operation:
    """How to parse the calls of a function, and the rule for them.

    Attributes:
        name: Name of the operation, as in `GradientEngine.operations`.
        weight_of: Function of the arguments of a call that returns the weight.
        parse: Function of the arguments of a call that returns a `Call`.
        rule: The rule.
        any_layout: Whether the rule supports calls with `samples_first=False`.
    """

    name: str
    weight_of: Callable[..., Any]
    parse: Callable[..., Call]
    rule: Rule
    any_layout: bool = False


# Intercepted function to its operation.
OPERATIONS: dict[Callable[..., Any], Operation] = {}


def register(operation: Operation, *functions: Callable[..., Any]) -> None:
    """Intercept calls of these functions as this operation."""
    for function in functions:
        OPERATIONS[function] = operation
