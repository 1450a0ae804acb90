"""The core against its peers, in one run: ratios, not absolute times."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fastsal
from benches.python.peers import sparseml_fisher, torch_inverse_diagonal
from fastsal import _core


def _rows(n: int, d: int, scale: float = 1e-2) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(0)) * scale


@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize("n", [8, 64])
def test_gram_rate_over_torch_mm(against, benchmark, block_size, n):
    d = 1 << 22
    rows = _rows(n, d).numpy()
    packed, sums = np.zeros(_core.packed_len(d, block_size), np.float32), np.zeros(d, np.float32)
    a, b, out = torch.randn(3072, 3072), torch.randn(3072, 3072), torch.empty(3072, 3072)
    ratio = against(
        lambda: _core.accumulate(rows, "float32", block_size, packed, sums),
        lambda: torch.mm(a, b, out=out),
        pairs=9,
        peer_name="torch.mm 3072^2",
    )
    useful = n * d * (block_size + 1)  # a product and a sum for each entry of the triangle
    rate = ratio * useful / (2 * 3072**3)
    benchmark.extra_info["rate_over_mm"] = rate
    print(f"B={block_size} n={n}: useful rate over torch.mm {rate:.2f}")


@pytest.mark.parametrize("n", [256, 1024])
def test_statistics_and_inverse_diagonal(against, benchmark, n):
    try:
        peer_class = sparseml_fisher()
    except ImportError as missing:
        pytest.skip(f"SparseML is not here: {missing}")
    d, block_size, damping = 1 << 20, 64, 1e-5
    rows = _rows(n, d)

    def ours():
        fisher = fastsal.BlockFisher({"w": (d,)}, block_size=block_size)
        for chunk in rows.split(64):
            fisher.update({"w": chunk})
        return fisher, fisher.inverse_diagonals(damping)["w"].values

    def peer():
        fisher = peer_class(n, block_size, d, damping, torch.device("cpu"))
        for row in rows:
            fisher.add_grad(row)
        return fisher, fisher.diag()

    against(ours, peer, pairs=1, peer_name="SparseML")
    exact = fastsal.BlockFisher({"w": (d,)}, block_size=block_size, precision="float64")
    exact.update({"w": rows})
    truth = exact.inverse_diagonals(damping)["w"].values
    (fisher, mine), (other, theirs) = ours(), peer()
    errors = [float(np.abs(np.asarray(x) / truth - 1).max()) for x in (mine, theirs)]
    memory = fisher.nbytes / (other.f_inv.numel() * 4)
    benchmark.extra_info.update(error=errors[0], peer_error=errors[1], memory_ratio=memory)
    print(f"N={n}: error {errors[0]:.1e}, SparseML {errors[1]:.1e}; memory {memory:.3f} of it")


def test_inverse_diagonal(against):
    blocks, size = 16384, 64
    rows = _rows(256, blocks * size)
    fisher = fastsal.BlockFisher({"w": (blocks * size,)}, block_size=size)
    fisher.update({"w": rows})
    dense = fisher.blocks("w").float()
    against(
        lambda: fisher.inverse_diagonals(1e-3),
        lambda: torch_inverse_diagonal(dense, 1e-3),
        peer_name="torch Cholesky + inverse, float32",
    )


@pytest.mark.parametrize("size", [32, 64, 128, 256])
def test_greedy_over_inverse_diagonal(against, size):
    d = 1 << 20
    fisher = fastsal.BlockFisher({"w": (d,)}, block_size=size)
    fisher.update({"w": _rows(2 * size, d)})
    model = torch.nn.Module()
    model.w = torch.nn.Parameter(_rows(1, d)[0])
    against(
        lambda: fastsal.score(model, fisher, "obs-greedy", 1e-3),
        lambda: fisher.inverse_diagonals(1e-3),
        peer_name="inverse diagonal of the same blocks",
    )


@pytest.mark.parametrize("peer", ["torch.kthvalue", "np.partition"])
def test_kth_smallest(against, peer):
    scores = torch.rand(86_000_000, generator=torch.Generator().manual_seed(0)).square().numpy()
    k = 9 * scores.size // 10
    jobs = {
        "torch.kthvalue": lambda: torch.from_numpy(scores).kthvalue(k),
        "np.partition": lambda: np.partition(scores, k),
    }
    assert _core.kth_smallest([scores], k) == np.partition(scores, k - 1)[k - 1]
    against(lambda: _core.kth_smallest([scores], k), jobs[peer], pairs=3, peer_name=peer)
