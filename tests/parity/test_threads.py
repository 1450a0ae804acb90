"""Results do not depend on the number of threads."""

from __future__ import annotations

import pytest
import torch

import fastsal

_REFERENCE: dict[int, list[torch.Tensor]] = {}


@pytest.mark.parametrize("threads", [1, 2, 7])
# Of two large blocks, each is shared by seven threads, and processed by one of two.
@pytest.mark.parametrize(("shape", "block_size"), [((300, 40), 64), ((2, 700), 700)])
def test_results_do_not_depend_on_threads(shape, block_size, threads):
    fastsal.set_num_threads(threads)
    try:
        g = torch.randn(100, *shape, generator=torch.Generator().manual_seed(0))
        fisher = fastsal.BlockFisher({"w": shape}, block_size=block_size)
        fisher.update({"w": g})
        model = torch.nn.Module()
        model.w = torch.nn.Parameter(g[0].round(decimals=1))
        result = [fisher.blocks("w")]
        for criterion in ("magnitude", "block-fisher", "obs-greedy"):
            scores = fastsal.score(model, fisher, criterion, 1e-2)
            masks = fastsal.rank(scores, 0.37)
            result += [scores["w"], masks["w"]]
        fastsal.compensate(model, fisher, masks, 1e-2)
        result.append(model.w.detach())
    finally:
        fastsal.set_num_threads(0)
    reference = _REFERENCE.setdefault(block_size, result)
    assert all(torch.equal(a, b) for a, b in zip(result, reference, strict=True))
