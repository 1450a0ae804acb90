"""Per-sample gradient of `y = x Wᵀ + b`: `G_n = sum_L dy_nLᵀ x_nL`."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsal.gradients.rules.operations import Call, Operation, UnreadCallError, register
from fastsal.gradients.workspace import Workspace


def _weight(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    del input, bias
    return weight


def _parse(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Call:
    del bias
    if input.dim() < 2:
        raise UnreadCallError("F.linear on an input without a sample axis")
    if weight.dim() != 2:
        raise UnreadCallError("F.linear with a weight of one axis")
    return Call("linear", input, tuple(weight.shape))


def linear_rule(call: Call, grad_output: Tensor, out: Tensor, workspace: Workspace) -> None:
    """Compute out `[n, O, C]` from input `[n·r, ..., C]` and grad_output `[n·r, ..., O]`.

    With `samples_first=False` they are `[..., n, C]` and `[..., n, O]`, read as strided views.
    """
    del workspace
    n = out.shape[0]
    features_out, features_in = call.weight_shape
    length = math.prod(call.input.shape[:-1]) // n
    if length == 1:
        dy, x = grad_output.reshape(n, features_out, 1), call.input.reshape(n, 1, features_in)
        torch.mul(dy, x, out=out)
        return
    if call.samples_first:
        x = call.input.reshape(n, length, features_in)
        dy = grad_output.reshape(n, length, features_out)
    else:
        x = call.input.reshape(length, n, features_in).transpose(0, 1)
        dy = grad_output.reshape(length, n, features_out).transpose(0, 1)
    torch.bmm(dy.transpose(1, 2), x, out=out)


register(Operation("linear", _weight, _parse, linear_rule, any_layout=True), F.linear)
