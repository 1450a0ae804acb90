"""Ways from rows to sums of squares, `F_b += G_bᵀ G_b`, on a device.

Axes: n rows, d weights, K blocks of B.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benches.gpu.size import GIB, Row, Size, read_rate, row, seconds
from fastsal.fisher.model_sums import ModelSums
from fastsal.fisher.sinks.streaming import RowStream
from fastsal.fisher.sinks.tiles import DeviceTiles
from fastsal.gradients.precision import full_float32

BLOCK = 64
# Bits of a float32 that TF32 does not have.
_LOST = 0x1FFF
Add = Callable[[Tensor, Tensor, Tensor], None]  # (squares [K, B, B], total [d], rows [n, d])


def blocks_of(rows: Tensor) -> Tensor:
    """Return rows `[n, d]` as `[K, n, B]`, with zeros after the last weight."""
    missing = -rows.shape[1] % BLOCK
    padded = torch.nn.functional.pad(rows, (0, missing)) if missing else rows
    return padded.view(len(rows), -1, BLOCK).transpose(0, 1)


def in_float32(squares: Tensor, total: Tensor, rows: Tensor) -> None:
    """Add by one batched product in float32."""
    blocks = blocks_of(rows)
    with full_float32():
        squares.baddbmm_(blocks.mT, blocks)
    total += rows.sum(0)


def in_tf32(squares: Tensor, total: Tensor, rows: Tensor) -> None:
    """Add by one batched product in TF32, which is not accurate: the bound of the way below."""
    blocks = blocks_of(rows)
    with _tf32():
        squares.baddbmm_(blocks.mT, blocks)
    total += rows.sum(0)


def rounded(rows: Tensor) -> Tensor:
    """Round float32 to the nearest number of TF32."""
    return ((rows.view(torch.int32) + (_LOST + 1) // 2) & ~_LOST).view(torch.float32)


def in_two_halves(squares: Tensor, total: Tensor, rows: Tensor) -> None:
    """Add by two batched products of TF32 with the accuracy of float32.

    With `G = H + L`, H in TF32, `GᵀG = HᵀH + HᵀL + LᵀH` up to `LᵀL`, which is below 2⁻²² of it. The
    symmetric part of `HᵀH + 2 HᵀL` is that sum, so that one product less is enough; `symmetric`
    takes it once at the end.
    """
    leading = rounded(rows)
    trailing = (rows - leading).mul_(2)
    a, b = blocks_of(leading), blocks_of(trailing)
    with _tf32():
        squares.baddbmm_(a.mT, a)
        squares.baddbmm_(a.mT, b)
    total += rows.sum(0)


def symmetric(squares: Tensor) -> Tensor:
    """Return the symmetric part of `[K, B, B]`."""
    return (squares + squares.mT) / 2


def fused(precision: str) -> Add:
    """Return the way of one kernel, which reads rows once; `precision` is that of Triton."""
    from benches.gpu.kernel import add

    return lambda squares, total, rows: add(squares, total, rows, precision)


WAYS: dict[str, Callable[[], Add]] = {
    "batched product, float32": lambda: in_float32,
    "batched product, TF32 (not accurate)": lambda: in_tf32,
    "two products of TF32": lambda: in_two_halves,
    "one kernel, 3xTF32": lambda: fused("tf32x3"),
    "one kernel, float32": lambda: fused("ieee"),
}


def error_of(add: Add, device: torch.device, n: int = 256, blocks: int = 16) -> float:
    """Return the largest error of an entry, relative to the diagonal entries of its row and column.

    The bound of float32 is a small multiple of 2⁻²⁴.
    """
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(n, blocks * BLOCK - 10, generator=generator)
    rows *= torch.logspace(-4, 0, rows.shape[1])[torch.randperm(rows.shape[1], generator=generator)]
    squares = torch.zeros(blocks, BLOCK, BLOCK, device=device)
    add(squares, torch.zeros(rows.shape[1], device=device), rows.to(device))
    exact = blocks_of(rows.double())
    exact = exact.mT @ exact
    scale = exact.diagonal(dim1=1, dim2=2).clamp(min=1e-30).sqrt()
    off = (symmetric(squares).cpu().double() - exact).abs()
    return float((off / (scale[:, :, None] * scale[:, None, :])).max())


def sums(size: Size, device: torch.device) -> Iterator[Row]:
    """Time every way for all weights and rows, as a multiple of reading the rows once.

    Raises:
        RuntimeError: A way failed; the others are measured before.
    """
    rate = read_rate(size, device)
    limit = 4 * size.weights * size.samples / rate
    yield row("bytes that the device reads", rate / GIB, "GiB/s")
    yield row("reading the rows once", limit, "s")
    count = math.ceil(size.weights / size.layer)
    squares_bytes = 4 * math.ceil(size.layer / BLOCK) * BLOCK**2
    if device.type == "cuda":
        room = 0.6 * torch.cuda.mem_get_info(device)[0] - 12 * max(size.rows) * size.layer
        count = max(1, min(count, int(room // squares_bytes)))
    scale = size.weights / (count * size.layer)
    tiles = [
        (
            torch.zeros(math.ceil(size.layer / BLOCK), BLOCK, BLOCK, device=device),
            torch.zeros(size.layer, device=device),
        )
        for _ in range(count)
    ]
    failed: list[str] = []
    for name, way in WAYS.items():
        try:
            add = way()
            yield row(f"{name}: error", error_of(add, device), "of the diagonal")
            for n in size.rows:
                rows = torch.randn(n, size.layer, device=device) * 1e-3

                def add_all(add: Add = add, rows: Tensor = rows) -> None:
                    for squares, total in tiles:
                        add(squares, total, rows)

                spent = scale * seconds(add_all, device, size.repeats) * size.samples / n
                yield row(f"{name}, {n} rows at a time", spent, "s", times=spent / limit, at_most=2)
                del rows
        except ImportError as missing:
            yield row(f"{name}: skipped", 0.0, "runs", error=str(missing))
        except Exception as error:  # one way that does not run here says nothing of the others
            failed.append(name)
            yield row(f"{name}: failed", 0.0, "runs", error=f"{type(error).__name__}: {error}")
    tiles.clear()
    yield from _library(size, device, limit, scale, count)
    if failed:
        raise RuntimeError(f"ways that do not run here: {', '.join(failed)}")


def _library(
    size: Size, device: torch.device, limit: float, scale: float, count: int
) -> Iterator[Row]:
    """Time the sinks of the package: sums on the device, and rows streamed to the core."""
    names = [f"w{i}" for i in range(count)]
    n = max(r for r in size.rows if r <= 64)
    rows = torch.randn(n, size.layer, device=device) * 1e-3
    held = ModelSums.empty(dict.fromkeys(names, (size.layer,)), BLOCK, "float32")
    sink = DeviceTiles(held, device)

    def add_all() -> None:
        for name in names:
            sink(name, rows)
        sink.end_micro_batch(n)

    spent = scale * seconds(add_all, device, size.repeats) * size.samples / n
    name = f"sums of the package on the device, {n} rows at a time"
    yield row(name, spent, "s", times=spent / limit, at_most=2)
    yield row("packing and copying them", scale * seconds(sink.flush, device), "s")
    few = names[: max(1, count // 4)]
    held = ModelSums.empty(dict.fromkeys(few, (size.layer,)), BLOCK, "float32")
    rows = rows[: size.streamed]
    stream = RowStream(held, device, expected=size.samples)

    def send_all() -> None:
        for name in few:
            stream(name, rows)
        stream.end_micro_batch(len(rows))

    spent = seconds(send_all, device, size.repeats)
    stream.flush()
    spent *= scale * count / len(few) * size.samples / len(rows)
    yield row("rows streamed to the core", spent, "s", times=spent / limit)


@contextlib.contextmanager
def _tf32() -> Iterator[None]:
    """Allow TF32 in matrix products."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
