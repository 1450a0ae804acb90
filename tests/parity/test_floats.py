"""Results do not depend on the floating-point environment of the caller."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fastsal
import fastsal._core as core

# Gradients whose conversion, or whose squares, are subnormal numbers: float16 below 6.1e-5, and
# float32 below 1.1e-19 or 1.2e-38.
CASES = [
    (torch.float16, 2e-5, "float32"),
    (torch.float16, 1e-7, "float64"),
    (torch.bfloat16, 1e-20, "float32"),
    (torch.bfloat16, 3e-39, "float64"),
    (torch.float32, 1e-20, "float32"),
    (torch.float32, 1e-39, "float64"),
]


@pytest.fixture
def flushing():
    """Builds a new pool while the caller flushes subnormal numbers; its threads inherit that."""

    def both(compute):
        results = []
        for threads, flush in ((2, False), (3, True)):
            fastsal.set_num_threads(threads)
            torch.set_flush_denormal(flush)
            try:
                results.append(compute())
                # The caller's environment is as it was.
                assert (float(torch.tensor([2e-38]) * 0.1) == 0) == flush
            finally:
                torch.set_flush_denormal(False)
                fastsal.set_num_threads(0)
        return results

    if not torch.set_flush_denormal(False):
        pytest.skip("this processor does not flush subnormal numbers")
    return both


@pytest.mark.parametrize(("dtype", "scale", "precision"), CASES)
@pytest.mark.parametrize("d", [40, 30_000])
def test_subnormal_numbers_are_kept(flushing, dtype, scale, precision, d):
    generator = torch.Generator().manual_seed(0)
    rows = (torch.randn(60, d, generator=generator) * scale).to(dtype)
    exact = rows.double().square().mean(0)

    def compute():
        fisher = fastsal.BlockFisher({"w": (d,)}, block_size=8, precision=precision)
        fisher.update({"w": rows})
        return fisher.diagonal()["w"].numpy().copy(), fisher.blocks("w").numpy().copy()

    plain, flushed = flushing(compute)
    assert plain[0].tobytes() == flushed[0].tobytes()
    assert plain[1].tobytes() == flushed[1].tobytes()
    # The sums are of subnormal numbers themselves, which have few digits.
    assert np.allclose(flushed[0], exact.numpy(), rtol=1e-3, atol=1e-44)
    assert (flushed[0] > 0).mean() > 0.9


@pytest.mark.parametrize("d", [20, 2000])
def test_every_function_keeps_subnormal_numbers(flushing, d):
    rng = np.random.default_rng(1)
    rows = (rng.standard_normal((30, d)) * 1e-20).astype(np.float32)
    tiny = (rng.standard_normal((3, d)) * 1e-39).astype(np.float32)
    weights = (rng.standard_normal(d) * 1e-39).astype(np.float32)
    packed, sums = np.empty(core.packed_len(d, 4), np.float32), np.zeros(d, np.float32)
    core.accumulate(rows, "float32", 4, packed, sums, True)
    some, kept = [(packed, d, 30.0, None)], np.arange(d) % 3 > 0

    def compute():
        found = [
            core.inverse(some, 4, 1e-300)[0],
            core.inverse_diagonal(some, 4, 1e-41)[0],
            core.eliminate(some, [weights], 4, 1e30)[0],
            core.compensate(some, [weights], [kept], 4, 1e-41)[0],
            core.dual_inverse_diagonal(tiny, "float32", 4, 3.0, None, 1e-80),
        ]
        return [np.asarray(x).tobytes() for result in found for x in result]

    plain, flushed = flushing(compute)
    assert plain == flushed
    assert (core.compensate(some, [weights], [kept], 4, 1e-41)[0][0] != 0).any()
