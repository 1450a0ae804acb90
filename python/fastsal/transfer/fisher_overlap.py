"""Overlap of the Fisher statistics of two image sets, layer by layer.

Two measures, both in [0, 1]: the cosine similarity of the diagonals, and the overlap of the
subspaces of largest curvature (Krzanowski, 1979, "Between-groups comparison of principal
components"). Gur-Ari et al. (2018), "Gradient descent happens in a tiny subspace", compare the top
eigenvectors of Hessians by the second measure.

Axes: K blocks of B weights, k eigenvectors of each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastsal.errors import InvalidArgument
from fastsal.fisher.block_fisher import BlockFisher
from fastsal.utils.numbers import whole

# Eigenvalues below this fraction of a block's largest, times its size, are rounding errors of
# float32 sums: their eigenvectors carry no information.
_ROUNDING = 2.0**-24
_CHUNK = 4096  # blocks per eigendecomposition


@dataclass(frozen=True)
class LayerOverlap:
    """Overlap of the Fisher statistics of two image sets at one parameter.

    Attributes:
        layer: Name of the parameter.
        position: Index among the parameters, from 0.
        diagonal: Cosine similarity of the diagonals, 0 to 1; 0 where one of them is zero.
        eigenspace: Mean over blocks of the overlap of the top eigenspaces, 0 to 1, see
            `fisher_overlap`; None where no block has curvature in both.
    """

    layer: str
    position: int
    diagonal: float
    eigenspace: float | None


def fisher_overlap(source: BlockFisher, target: BlockFisher, k: int = 4) -> list[LayerOverlap]:
    """Compare the Fisher statistics of a source and a target, layer by layer.

    The overlap of a block is `‖U_sᵀ U_t‖_F² / k`, where the columns of `U_s` and `U_t` are the k
    top eigenvectors of `F_b`. It is the mean squared cosine of the principal angles: 1 for equal
    subspaces, 0 for orthogonal ones, `k / B` on average for random ones. Where the rank of a block
    is below k, the sum is divided by the smaller of the two ranks. Blocks are weighted by their
    share of the trace of the layer, averaged over source and target. Blocks of k weights or fewer
    are ignored, as their subspace is the whole space.

    Args:
        source: Statistics of one image set.
        target: Statistics of another, for the same parameters and block size.
        k: Number of eigenvectors per block, at least 1.

    Returns:
        One entry per parameter, in the order of `source.names`.

    Raises:
        InvalidArgument: `k` is out of range, parameters, shapes or block sizes differ, or one of
            the two holds no samples.
    """
    k = whole("k", k, 1)
    if source.shapes != target.shapes or source.block_size != target.block_size:
        raise InvalidArgument(
            "target must have the parameters, shapes and block size of source, got "
            f"{target!r} and {source!r}"
        )
    diagonals = source.diagonal(), target.diagonal()
    return [
        LayerOverlap(
            name,
            position,
            _cosine(*(found[name].reshape(-1) for found in diagonals)),
            _eigenspace(source.blocks(name), target.blocks(name), _sizes(source, name), k),
        )
        for position, name in enumerate(source.names)
    ]


def _cosine(a: Tensor, b: Tensor) -> float:
    norms = float(a.norm()) * float(b.norm())
    return min(1.0, float(a @ b) / norms) if norms > 0 else 0.0


def _sizes(fisher: BlockFisher, name: str) -> list[int]:
    """Return the number of weights in each block of a parameter."""
    d = math.prod(fisher.shapes[name])
    size = fisher.block_size or d
    return [min(size, d - start) for start in range(0, d, size)]


def _eigenspace(source: Tensor, target: Tensor, sizes: list[int], k: int) -> float | None:
    """Return the trace-weighted mean overlap of blocks `[K, B, B]`; None if none is comparable."""
    if source.shape[1] <= k:
        return None
    shares = sum(_shares(blocks) for blocks in (source, target)) / 2
    overlaps, defined = [], []
    for start in range(0, len(source), _CHUNK):
        part = slice(start, start + _CHUNK)
        (us, ranks_s), (ut, ranks_t) = _top(source[part], k), _top(target[part], k)
        dimensions = torch.minimum(ranks_s, ranks_t)
        shared = (us.transpose(1, 2) @ ut).square().sum(dim=(1, 2))
        overlaps.append(shared / dimensions.clamp(min=1))
        defined.append(dimensions > 0)
    is_comparable = torch.cat(defined) & (torch.tensor(sizes, device="cpu") > k)
    weights = shares * is_comparable
    total = float(weights.sum())
    if total == 0:
        return None
    return min(1.0, float(weights @ torch.cat(overlaps)) / total)


def _shares(blocks: Tensor) -> Tensor:
    """Return the share of each block in the total trace, `[K]`."""
    traces = blocks.diagonal(dim1=1, dim2=2).sum(dim=1)
    return traces / traces.sum().clamp(min=torch.finfo(torch.float64).tiny)


def _top(blocks: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the top eigenvectors `[K, B, k]`, zero beyond the rank of a block, and the ranks."""
    values, vectors = torch.linalg.eigh(blocks)
    values, vectors = values[:, -k:], vectors[:, :, -k:]
    noise = _ROUNDING * blocks.shape[1] * values[:, -1:]
    is_real = (values > noise) & (values > 0)
    return vectors * is_real[:, None, :], is_real.sum(dim=1)
