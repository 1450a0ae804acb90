"""`fastsal bench`: figures are ratios of both jobs, and debug builds are refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from benches.table import table
from fastsal import BlockFisher, _core
from fastsal.cli import main
from fastsal.cli.bench.cases import cases_of
from fastsal.cli.bench.peers import torch_compensation, torch_dual_diagonal, torch_n_of_m
from fastsal.cli.bench.sizes import BenchSize, longer
from fastsal.cli.bench.timing import Case, Comparison, Result, Seconds, Skip, run


def test_both_sides_run_in_turn_and_the_median_ratio_is_kept():
    calls = []
    ratios = iter([3.0, 1.0, 2.0])
    comparison = Comparison(
        lambda: calls.append("ours"),
        lambda: calls.append("peer"),
        "a peer",
        lambda ours, theirs: next(ratios),
        pairs=3,
        after=lambda: "noted",
    )
    (result,) = run(iter([Case("a case", "times", 1.5, lambda: comparison)]))
    assert calls == ["ours"] + ["ours", "peer"] * 3
    assert (result.ratio, result.peer, result.note, result.met) == (2.0, "a peer", "noted", True)


def test_a_job_may_measure_itself_and_begin_cold():
    calls = []

    def ours():
        calls.append("ours")
        return Seconds(3.0)

    comparison = Comparison(ours, lambda: Seconds(2.0), "", longer, pairs=1, warm_up=False)
    (result,) = run(iter([Case("a case", "times", 1.5, lambda: comparison, at_least=False)]))
    assert calls == ["ours"]
    assert (result.ours, result.theirs, result.ratio, result.met) == (3.0, 2.0, 1.5, True)


def test_a_missing_peer_is_named():
    def setup():
        raise Skip("no peer")

    (result,) = run(iter([Case("a case", "times", 1.0, setup)]))
    assert (result.ratio, result.met, result.note) == (None, None, "skipped: no peer")


@pytest.mark.parametrize(("at_least", "met"), [(True, False), (False, True)])
def test_limits_have_a_direction(at_least, met):
    assert Result("", "", 2.0, at_least, ratio=1.0).met is met


def test_names_are_unique():
    for size in (BenchSize(), BenchSize.full()):
        names = [(case.name, case.limit) for case in cases_of(size)]
        assert len(set(names)) == len(names)


def test_the_command_writes_what_it_prints(tmp_path):
    out = tmp_path / "bench.json"
    given = ["bench", "--only", "16,384 blocks of 16, in float64", "--json", "--out", str(out)]
    result = CliRunner().invoke(main, given)
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record == json.loads(out.read_text())
    (row,) = record["results"]
    assert row["ratio"] > 0
    assert record["machine"]["torch"]


def test_a_debug_build_is_refused(monkeypatch):
    monkeypatch.setattr(_core, "build_info", lambda: ("0", "portable", False))
    result = CliRunner().invoke(main, ["bench"])
    assert result.exit_code == 2
    assert "debug build" in result.output


def test_peers_compute_what_the_core_does():
    block, d, damping = 16, 64, 1e-2
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(40, d, generator=generator)
    weights = torch.randn(d, generator=generator)
    kept = torch.rand(d, generator=generator) < 0.5
    fisher = BlockFisher({"w": (d,)}, block_size=block)
    fisher.update({"w": gradients})
    sums = np.zeros(_core.packed_len(d, block), np.float32)
    _core.accumulate(gradients.numpy(), "float32", block, sums, np.zeros(d, np.float32))

    damped = fisher.blocks("w").float() + damping * torch.eye(block)
    peer = torch_compensation(damped, weights.view(-1, block), kept.view(-1, block)).flatten()
    parameter = (sums, d, 40.0, None)
    ((moved, *_),) = _core.compensate(
        [parameter], [weights.numpy()], [kept.numpy()], block, damping
    )
    torch.testing.assert_close(peer, torch.from_numpy(moved), rtol=1e-3, atol=1e-4)

    some = gradients[:5]
    peer = torch_dual_diagonal(some, block, damping).flatten()
    values, *_ = _core.dual_inverse_diagonal(some.numpy(), "float32", block, 5.0, None, damping)
    torch.testing.assert_close(peer.double(), torch.from_numpy(values), rtol=1e-3, atol=1e-3)

    mask = _core.n_of_m(weights.numpy(), (1, d, 1), 2, 4)
    assert torch.equal(torch_n_of_m(weights, 2, 4), torch.from_numpy(mask))


def test_machines_are_beside_each_other():
    def record(instructions, **ratios):
        first_touch = {"first touch of fresh memory, s/GiB": 0.5}
        machine = {"processor": "P", "cores": 2, "instructions": instructions, "threads": 2}
        shared = {"figure": "times", "limit": 2.0, "at_least": True, "peer": "torch", "note": ""}
        results = [{"name": name, "ratio": ratio, **shared} for name, ratio in ratios.items()]
        return {"machine": machine | first_touch | {"torch": "2"}, "results": results}

    lines = table([record("avx2", gram=1.5, skipped=None), record("avx512f", gram=2.5, mask=3.0)])
    assert lines[:5] == [
        "| what | against | P, avx2 | P, avx512f |",
        "|---|---|---|---|",
        "| gram | torch | 1.50 times (≥ 2) | 2.50 times (≥ 2) |",
        "| mask | torch |  | 3.00 times (≥ 2) |",
        "",
    ]
    assert len(lines) == 7
