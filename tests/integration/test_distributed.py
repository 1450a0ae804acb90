"""Several processes on one machine: the sums, masks and weights of one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import fastsal
from fastsal.fisher.collection.traffic import costs
from fastsal.fisher.sinks.gathering import step_rows

from . import ranks_job

JOB = Path(ranks_job.__file__)
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
# Matrix products of PyTorch round otherwise on two threads than on the one of each rank.
pytestmark = pytest.mark.usefixtures("one_thread")


def torchrun(ranks, *command):
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"),
        *map(str, command),
    ]


def run_job(ranks, script, tmp_path_factory):
    """Run a script on so many ranks; returns their number and the folder of what it wrote."""
    folder = tmp_path_factory.mktemp(f"ranks{ranks}")
    ended = subprocess.run(
        torchrun(ranks, script, folder), env=ENVIRONMENT, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ranks, folder


@pytest.fixture(scope="module", params=[2, 4])
def job(request, tmp_path_factory):
    """What a job of so many ranks left behind."""
    return run_job(request.param, JOB, tmp_path_factory)


def told(folder, rank):
    return json.loads((folder / f"told{rank}.json").read_text())


def test_sums_are_those_of_one_process(job):
    ranks, folder = job
    whole = fastsal.collect(ranks_job.net(), ranks_job.images(), micro_batch=2)
    found = {name: [] for name in whole.names}
    for rank in range(ranks):
        for key, (blocks, samples) in torch.load(folder / f"blocks{rank}.pt").items():
            assert samples == 52
            found[key.split("[")[0]].append(blocks)
    for name, parts in found.items():
        assert torch.equal(torch.cat(parts), whole.blocks(name)), name


def test_partial_sums_are_the_same_sums(job):
    ranks, folder = job
    for rank in range(ranks):
        summed = torch.load(folder / f"summed{rank}.pt")
        for key, (blocks, _) in torch.load(folder / f"blocks{rank}.pt").items():
            torch.testing.assert_close(
                summed[key], blocks, rtol=1e-5, atol=1e-6 * float(blocks.abs().max())
            )


def test_partial_sums_within_a_budget(job):
    _, folder = job
    whole = fastsal.collect(ranks_job.net(), ranks_job.images(), micro_batch=2)
    loaded = fastsal.BlockFisher.load(folder / "summed")
    assert loaded.samples == 52
    for name in whole.names:
        blocks = whole.blocks(name)
        atol = 1e-6 * float(blocks.abs().max())
        torch.testing.assert_close(loaded.blocks(name), blocks, rtol=1e-5, atol=atol)


def test_files_of_ranks_are_read_as_one(job):
    _, folder = job
    whole = fastsal.collect(ranks_job.net(), ranks_job.images(), micro_batch=2)
    loaded = fastsal.BlockFisher.load(folder / "fisher")
    assert loaded.names == whole.names
    for name in whole.names:
        torch.testing.assert_close(loaded.blocks(name), whole.blocks(name), rtol=1e-5, atol=1e-9)
    scores = [fastsal.score(ranks_job.net(), f, "obs-greedy") for f in (whole, loaded)]
    assert fastsal.rank(scores[0], 0.6) == fastsal.rank(scores[1], 0.6)


def test_every_rank_holds_its_share(job):
    ranks, folder = job
    whole = fastsal.collect(ranks_job.net(), ranks_job.images(), micro_batch=2).nbytes
    for rank in range(ranks):
        assert told(folder, rank)["nbytes"] == pytest.approx(whole / ranks, rel=0.1)


@pytest.mark.parametrize("how", [*ranks_job.HOW, *ranks_job.LIMITED])
def test_masks_and_weights_are_those_of_one_process(job, how):
    ranks, folder = job
    model = ranks_job.net()
    ways = ranks_job.HOW | ranks_job.LIMITED
    expected = ranks_job.prune(fastsal.prune, model, ways[how])
    for rank in range(1 if how in ("auto", "floor") else ranks):  # a whole state is rank 0's
        masks, state = torch.load(folder / f"{how}{rank}.pt")
        for name, mask in expected.masks.items():
            assert torch.equal(masks[name], mask), name
        for name, value in model.state_dict().items():
            assert torch.equal(state[name], value), name


@pytest.mark.parametrize("how", ["fixed", "auto", "auto features", "sampled", "safe"])
def test_micro_batches_are_those_of_one_process(job, how):
    """Kernels round by the number of samples: none runs beside others than in one process."""
    ranks, folder = job
    model = ranks_job.net()
    with ranks_job.watching(model) as expected:
        ranks_job.prune(fastsal.prune, model, ranks_job.HOW[how])
    seen = [set(told(folder, rank)[how]["seen"]) for rank in range(ranks)]
    # Passes of one image that nothing else uses look for the classifier; other passes of one image,
    # of the last held-out micro-batch, are told by the losses that the next test compares.
    found, expected = (
        {batch for batch in all_seen if not batch.startswith("1 ")}
        for all_seen in (set.union(*seen), expected)
    )
    assert found == expected


@pytest.mark.parametrize("how", ["auto", "auto features", "budget auto", "again auto"])
def test_held_out_losses_are_those_of_one_process(job, how):
    ranks, folder = job
    ways = ranks_job.HOW | ranks_job.LIMITED
    expected = ranks_job.prune(fastsal.prune, ranks_job.net(), ways[how])
    for rank in range(ranks):
        found = [tuple(pair) for pair in told(folder, rank)[how]["evidence"]]
        assert found == expected.history[0].damping_evidence


@pytest.mark.parametrize("how", ranks_job.LIMITED)
def test_a_budget_takes_several_passes(job, how):
    ranks, folder = job
    plans = [told(folder, rank)[how]["plan"] for rank in range(ranks)]
    assert all(plan == plans[0] for plan in plans)
    assert plans[0]["place"] == ("file" if how.startswith("budget") else "recomputed")
    assert plans[0]["passes"] > 1
    assert plans[0]["memory"] <= ranks_job.BUDGET
    whole = fastsal.collect(ranks_job.net(), ranks_job.images(), micro_batch=2).nbytes
    assert plans[0]["statistics"] < 1.2 * whole / ranks


@pytest.mark.parametrize("place", ["memory", "again"])
def test_a_damping_that_fails_on_one_rank_fails_on_all(job, place):
    ranks, folder = job
    evidence = [told(folder, rank)[f"failing {place}"]["evidence"] for rank in range(ranks)]
    masks = [torch.load(folder / f"failing {place}{rank}.pt") for rank in range(ranks)]
    for found, kept in zip(evidence, masks, strict=True):
        assert [np.isnan(loss) for _, loss in found] == [True] + [False] * (len(found) - 1)
        assert all(torch.equal(mask, masks[0][name]) for name, mask in kept.items())


def test_a_limit_is_tested_on_the_images_of_all_ranks(job):
    ranks, folder = job
    model = ranks_job.net()
    expected = ranks_job.prune(fastsal.prune, model, ranks_job.HOW["safe"]).safety.as_dict()
    for rank in range(ranks):
        found = told(folder, rank)["safe"]["safe"]
        assert found["images"] == expected["images"] == 13
        assert found["sparsity"] == expected["sparsity"] > 0
        for point, other in zip(found["curve"], expected["curve"], strict=True):
            # What ranks predict for their parts is added in another order.
            predicted = pytest.approx(other["predicted"], rel=1e-12)
            assert point == other | {"predicted": predicted}


@pytest.mark.parametrize("floor", [0.0, 0.35])
def test_ties_go_by_position(job, floor):
    ranks, folder = job
    shapes = {n: p.shape for n, p in ranks_job.net().named_parameters() if p.dim() > 1}
    torch.manual_seed(3)
    scores = {name: torch.randint(0, 5, shape).float() for name, shape in shapes.items()}
    expected = fastsal.rank(scores, 0.6, floor=floor)
    for rank in range(ranks):
        found = torch.load(folder / f"ties{floor}{rank}.pt")
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    expected = fastsal.rank(scores, 0.6, floor=floor, costs=ranks_job.costs_of(shapes))
    for rank in range(ranks):
        found = torch.load(folder / f"costs{floor}{rank}.pt")
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_parts_of_a_model_have_their_own_sparsities(job, scope):
    ranks, folder = job
    shapes = {n: p.shape for n, p in ranks_job.net().named_parameters() if p.dim() > 1}
    torch.manual_seed(3)
    scores = {name: torch.randint(0, 5, shape).float() for name, shape in shapes.items()}
    expected = fastsal.rank(scores, ranks_job.parts_of_a_model(shapes), scope)
    assert min(mask.float().mean() for mask in expected.values()) < 0.5
    for rank in range(ranks):
        found = torch.load(folder / f"parts{scope}{rank}.pt")
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_bytes_are_those_on_paper(job):
    ranks, folder = job
    chosen = fastsal.select_parameters(ranks_job.net())
    shapes = {name: tuple(p.shape) for name, p in chosen.items()}
    step = step_rows(chosen, fastsal.BlockFisher(shapes).final_nbytes, 2)
    paper = costs(shapes, 52, ranks, micro_batch=2, step=step)
    sent = [told(folder, rank)["fixed"]["sent_bytes"] for rank in range(ranks)]
    assert [s["rows"] for s in sent] == paper.rows
    assert [s["weights"] for s in sent] == paper.weights
    assert [s["masks"] for s in sent] == paper.masks
    came = [told(folder, rank)["fixed"]["in_flight_bytes"] for rank in range(ranks)]
    assert came == paper.in_flight
    assert [told(folder, rank)["nbytes"] for rank in range(ranks)] == paper.statistics


@pytest.fixture
def data(tmp_path):
    generator = np.random.default_rng(0)
    y = np.repeat(np.arange(4), 16)
    x = generator.integers(0, 255, (64, 32, 32, 3), np.uint8)
    np.savez(tmp_path / "images.npz", x=x, y=y)
    return tmp_path / "images.npz"


def command(data, out, *more):
    return [
        *("-m", "fastsal", "prune", "resnet10t", "--data", data, "--size", "32"),
        *("--num-classes", "4", "--sparsity", "0.8", "--rounds", "3", "--damping", "1e-3"),
        *("--micro-batch", "4", "--threads", "1", "--quiet", "--out", out, *more),
    ]


def masks_of(folder):
    return fastsal.Masks.load(folder / "masks.safetensors")


def test_the_command_under_torchrun(tmp_path, data):
    subprocess.run([sys.executable, *map(str, command(data, tmp_path / "one"))], check=True)
    ended = subprocess.run(
        torchrun(2, *command(data, tmp_path / "two")),
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert ended.stdout.count("Written to") == 1
    assert masks_of(tmp_path / "one") == masks_of(tmp_path / "two")
    report = json.loads((tmp_path / "two" / "report.json").read_text())
    assert report["history"][-1]["ranks"]["size"] == 2


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds processes in /proc")
def test_a_rank_that_is_killed(tmp_path, data):
    """The others end soon, with one line; the same command ends with the same masks."""
    checkpoint = tmp_path / "state"
    more = ("--checkpoint", checkpoint, "--samples", "64")
    running = subprocess.Popen(
        torchrun(2, *command(data, tmp_path / "out", *more)),
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not checkpoint.exists():
        assert time.monotonic() < deadline, "no checkpoint"
        assert running.poll() is None, running.communicate()[1][-3000:]
        time.sleep(0.02)
    children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    killed = time.monotonic()
    _, said = running.communicate(timeout=60)
    assert time.monotonic() - killed < 60
    lines = [line for line in said.splitlines() if "another rank ended" in line]
    assert len(lines) <= 1, said  # none where torchrun was faster to end the other
    assert running.returncode != 0
    assert not (tmp_path / "out").exists()
    again = subprocess.run(
        torchrun(2, *command(data, tmp_path / "out", *more)),
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert again.returncode == 0, again.stderr[-3000:]
    assert not checkpoint.exists()
    subprocess.run([sys.executable, *map(str, command(data, tmp_path / "one"))], check=True)
    assert masks_of(tmp_path / "one") == masks_of(tmp_path / "out")
