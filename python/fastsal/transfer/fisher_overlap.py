"""How alike the Fishers of two image sets are, layer by layer.

Two measures, both from 0 to 1: the cosine of the two diagonals, and how far the directions of
greatest curvature are the same (Krzanowski, 1979, "Between-groups comparison of principal
components", for the measure; Gur-Ari et al., 2018, "Gradient descent happens in a tiny subspace",
compare top Hessian eigenvectors by it).

Axes: K blocks of B weights, k eigenvectors of each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastsal.errors import InvalidArgument
from fastsal.fisher.block_fisher import BlockFisher

# Eigenvalues below this part of a block's greatest, for each of its weights, are rounding of
# float32 sums: their eigenvectors mean nothing.
_ROUNDING = 2.0**-24
_CHUNK = 4096  # blocks whose eigenvectors are found at a time


@dataclass(frozen=True)
class LayerOverlap:
    """How alike two Fishers are at one parameter.

    Attributes:
        layer: the parameter's name.
        position: its place among the parameters, from 0.
        diagonal: cosine of the two diagonals, 0 to 1; 0 where one of them is zero.
        eigenspace: mean over blocks of the overlap of the top eigenspaces, 0 to 1, see
            `fisher_overlap`; None where no block has curvature in both.
    """

    layer: str
    position: int
    diagonal: float
    eigenspace: float | None


def fisher_overlap(source: BlockFisher, target: BlockFisher, k: int = 4) -> list[LayerOverlap]:
    """Compare the Fishers of a source and a target.

    In each block `‖U_sᵀ U_t‖_F² / k`, with the k top eigenvectors of `F_b` as columns of `U_s` and
    `U_t`, is the mean squared cosine of the angles between the two spaces: 1 for the same space, 0
    for orthogonal ones, `k / B` for spaces by chance. A space has fewer dimensions where the block
    has a lower rank; the division is then by the lesser of the two dimensions. Blocks weigh in by
    their part of the layer's trace, mean of source and target. Blocks of k weights or fewer, where
    the spaces are everything, are left out.

    Args:
        source: statistics of one image set.
        target: of another, for the same parameters and block size.
        k: eigenvectors of a block, 1 or more.

    Returns:
        One entry a parameter, in the order of `source.names`.

    Raises:
        InvalidArgument: `k` is out of range, the two do not fit, or one holds no samples.
    """
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise InvalidArgument(f"k: got {k!r}; takes 1 or more")
    if source.shapes != target.shapes or source.block_size != target.block_size:
        raise InvalidArgument(
            f"target: has other parameters, shapes or block size ({target!r} beside {source!r}); "
            "takes statistics of the same model"
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
    """Weights of each block of a parameter."""
    d = math.prod(fisher.shapes[name])
    size = fisher.block_size or d
    return [min(size, d - start) for start in range(0, d, size)]


def _eigenspace(source: Tensor, target: Tensor, sizes: list[int], k: int) -> float | None:
    """Mean over blocks `[K, B, B]`, by their traces; None where nothing can be compared."""
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
    is_told = torch.cat(defined) & (torch.tensor(sizes) > k)
    weights = shares * is_told
    total = float(weights.sum())
    if total == 0:
        return None
    return min(1.0, float(weights @ torch.cat(overlaps)) / total)


def _shares(blocks: Tensor) -> Tensor:
    """Part of each block in the trace of all."""
    traces = blocks.diagonal(dim1=1, dim2=2).sum(dim=1)
    return traces / traces.sum().clamp(min=torch.finfo(torch.float64).tiny)


def _top(blocks: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Top eigenvectors `[K, B, k]`, zeros beyond a block's rank, and the number that are not."""
    values, vectors = torch.linalg.eigh(blocks)
    values, vectors = values[:, -k:], vectors[:, :, -k:]
    noise = _ROUNDING * blocks.shape[1] * values[:, -1:]
    is_real = (values > noise) & (values > 0)
    return vectors * is_real[:, None, :], is_real.sum(dim=1)
