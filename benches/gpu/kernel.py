"""One kernel of Triton that reads rows once and keeps the products of a block in registers.

Without a GPU, Triton interprets it. Axes: n rows, d weights, K blocks of B.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined

import triton
import triton.language as tl

_ROWS = 32  # rows of one product


@triton.jit
def _gram(
    rows, squares, total, n, d,
    B: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    column = block * B + tl.arange(0, B)
    products = tl.zeros((B, B), tl.float32)
    sums = tl.zeros((B,), tl.float32)
    for start in range(0, n, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row[:, None] < n) & (column[None, :] < d)
        x = tl.load(rows + row[:, None].to(tl.int64) * d + column[None, :], mask=inside, other=0.0)
        products = tl.dot(tl.trans(x), x, products, input_precision=PRECISION)
        sums += tl.sum(x, 0)
    first = squares + block.to(tl.int64) * B * B
    entry = first + tl.arange(0, B)[:, None] * B + tl.arange(0, B)[None, :]
    tl.store(entry, tl.load(entry) + products)
    where = total + column
    known = column < d
    tl.store(where, tl.load(where, mask=known, other=0.0) + sums, mask=known)


def add(squares: Tensor, total: Tensor, rows: Tensor, precision: str) -> None:
    """Add `GᵀG` of rows `[n, d]` to squares `[K, B, B]`, and their sum to `total` `[d]`."""
    n, d = rows.shape
    count, block, _ = squares.shape
    _gram[(count,)](
        rows, squares, total, n, d, B=block, ROWS=_ROWS, PRECISION=precision, num_warps=4
    )
