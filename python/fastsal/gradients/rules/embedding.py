"""Per-sample gradient of an embedding `y = W[t]`: `G_n[v] = sum_{L: t_nL = v} dy_nL`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsal.gradients.rules.operations import (
    Call,
    Operation,
    RefusedCallError,
    UnreadCallError,
    register,
)
from fastsal.gradients.workspace import Workspace


def _weight(input: Tensor, weight: Tensor, *args: object, **kwargs: object) -> Tensor:
    del input, args, kwargs
    return weight


def _parse(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Call:
    del norm_type, sparse  # gradients are dense here
    if max_norm is not None:
        raise RefusedCallError(
            "max_norm changes the weight in every forward pass, so that samples have gradients at "
            "different weights; set max_norm of the layer to None"
        )
    if scale_grad_by_freq:
        raise RefusedCallError(
            "scale_grad_by_freq divides gradients by counts of the batch, so that they are not "
            "those of a sample's loss; set scale_grad_by_freq of the layer to False"
        )
    if input.dim() < 1:
        raise UnreadCallError("F.embedding of a single token, without a sample axis")
    shape = tuple(weight.shape)
    ignored = None if padding_idx is None else padding_idx % shape[0]
    return Call("embedding", input, shape, ignored_index=ignored)


def embedding_rule(call: Call, grad_output: Tensor, out: Tensor, workspace: Workspace) -> None:
    """Compute out `[n, V, D]` from tokens `[n·r, ...]` and grad_output `[n·r, ..., D]`.

    With `samples_first=False` they are `[..., n]` and `[..., n, D]`.
    """
    del workspace
    n, (vocabulary, width) = out.shape[0], call.weight_shape
    tokens, dy = call.input, grad_output
    if call.samples_first:
        tokens, dy = tokens.reshape(n, -1), dy.reshape(n, -1, width)
    else:
        tokens, dy = tokens.reshape(-1, n).t(), dy.reshape(-1, n, width).transpose(0, 1)
    # The gradients of all samples form one matrix, in which each sample has its own rows.
    first = torch.arange(n, device=tokens.device).unsqueeze(1) * vocabulary
    out.zero_()
    rows = out.view(n * vocabulary, width)
    rows.index_add_(0, (tokens + first).reshape(-1), dy.reshape(-1, width))
    if call.ignored_index is not None:
        out[:, call.ignored_index] = 0


register(Operation("embedding", _weight, _parse, embedding_rule, any_layout=True), F.embedding)
