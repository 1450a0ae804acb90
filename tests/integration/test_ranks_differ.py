"""Ranks whose micro-batches use other layers, and ranks of which one fails."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import fastsal

from . import routed_job
from .test_distributed import run_job

JOB = Path(routed_job.__file__)
# Matrix products of PyTorch round otherwise on two threads than on the one of each rank.
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=[2, 4])
def job(request, tmp_path_factory):
    """What a job of so many ranks left behind."""
    return run_job(request.param, JOB, tmp_path_factory)


@pytest.mark.parametrize("budget", [0, 2])
@pytest.mark.parametrize("name", routed_job.MODELS)
def test_sums_of_a_routed_model_are_those_of_one_process(job, name, budget):
    """Bit for bit, though a rank may skip a layer that others use, or use it in another turn."""
    ranks, folder = job
    model = routed_job.MODELS[name]()
    whole = fastsal.collect(model, routed_job.images(), micro_batch=2, block_size=16)
    found = {key: [] for key in whole.names}
    for rank in range(ranks):
        for key, (blocks, samples) in torch.load(folder / f"{name}{budget}{rank}.pt").items():
            assert samples == 53
            found[key.split("[")[0]].append(blocks)
    for key, parts in found.items():
        assert torch.equal(torch.cat(parts), whole.blocks(key)), key


# The type on the rank that fails, that on the others, and what these say.
EXPECTED = {
    "iterator": ("Broken", "FailedRankError", "Broken: disk"),
    "interrupt": ("KeyboardInterrupt", "FailedRankError", "KeyboardInterrupt"),
    "first batch": ("OSError", "FailedRankError", "OSError: gone"),
    "forward": ("MemoryError", "FailedRankError", "MemoryError: no room"),
    "backward": ("Broken", "FailedRankError", "Broken: hook"),
    "again": ("Broken", "FailedRankError", "Broken: again"),
    "and again": ("Broken", "FailedRankError", "Broken: again"),
    "sums": ("Broken", "FailedRankError", "Broken: hook"),
    "held out": ("Broken", "FailedRankError", "Broken: loss"),
    "model": ("Broken", "FailedRankError", "Broken: hook"),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_the_error_of_one_rank_ends_all(job, name):
    ranks, folder = job
    own, others, text = EXPECTED[name]
    failing = 0 if name == "held out" else ranks - 1
    for rank in range(ranks):
        told = json.loads((folder / f"told{rank}.json").read_text())
        kind, said, *notes = told[name]
        if rank == failing:
            assert kind == own
            assert set(notes) <= {f"rank {rank} of {ranks} failed"}
        else:
            assert (kind, said) == (others, f"rank {failing} of {ranks} failed: {text}")


def test_a_file_that_one_rank_cannot_write(job):
    ranks, folder = job
    for rank in range(ranks):
        kind, said, *_ = json.loads((folder / f"told{rank}.json").read_text())["file"]
        if rank < ranks - 1:
            assert kind == "FailedRankError"
            assert said.startswith(f"rank {ranks - 1} of {ranks} failed: ")


def test_an_image_that_is_not_a_number_is_named_on_all_ranks(job):
    """By its number among all images, not among those of the rank that ran it."""
    ranks, folder = job
    for rank in range(ranks):
        kind, said, *_ = json.loads((folder / f"told{rank}.json").read_text())["image"]
        assert kind == "NonFiniteGradient"
        assert "sample 30: the loss must be finite" in said
        assert said.startswith(f"rank {30 // 2 % ranks} of {ranks}: ")


@pytest.mark.parametrize(
    ("name", "kind", "text"),
    [
        ("samples", "DataError", "batches must be the same on every rank, got ["),
        ("labels", "DataError", "batches must be the same on every rank, in the same order"),
        ("arguments", "InvalidArgument", "block_size must be the same on every rank, got [16, "),
        ("calls", "InvalidArgument", "must be the same on every rank, got ["),
    ],
)
def test_ranks_that_were_called_with_other_arguments(job, name, kind, text):
    ranks, folder = job
    for rank in range(ranks):
        found = json.loads((folder / f"told{rank}.json").read_text())[name]
        assert found[0] == kind
        assert text in found[1]
