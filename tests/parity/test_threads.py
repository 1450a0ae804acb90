"""Results do not depend on the number of threads."""

from __future__ import annotations

import pytest
import torch

import fastsal

_REFERENCE: dict[str, list[torch.Tensor]] = {}


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_results_do_not_depend_on_threads(threads):
    fastsal.set_num_threads(threads)
    try:
        g = torch.randn(100, 300, 40, generator=torch.Generator().manual_seed(0))
        fisher = fastsal.BlockFisher({"w": (300, 40)})
        fisher.update({"w": g})
        model = torch.nn.Module()
        model.w = torch.nn.Parameter(g[0].round(decimals=1))
        result = [fisher.blocks("w")]
        for criterion in ("magnitude", "block-fisher", "obs-greedy"):
            scores = fastsal.score(model, fisher, criterion, 1e-2)
            result += [scores["w"], fastsal.rank(scores, 0.37)["w"]]
    finally:
        fastsal.set_num_threads(0)
    reference = _REFERENCE.setdefault("one thread", result)
    assert all(torch.equal(a, b) for a, b in zip(result, reference, strict=True))
