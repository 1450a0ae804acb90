"""Errors that ranks tell each other."""

from __future__ import annotations

import click
import pytest
import torch
import torch.distributed as dist
from click.testing import CliRunner

import fastsal.distributed
from fastsal.cli.group import STATUS_ERROR, Group
from fastsal.distributed.failures import (
    FailedRankError,
    LostRankError,
    decoded,
    encoded,
    is_loss,
    is_told,
)
from fastsal.distributed.ranks import Ranks
from fastsal.errors import DataError, FactorizationError, UnknownParameter


@pytest.fixture(scope="module", autouse=True)
def group():
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", [DataError, FactorizationError, UnknownParameter])
def test_an_error_of_fastsal_has_the_same_type_on_all_ranks(kind):
    error = decoded(encoded(kind("images must be\n finite")), 1, 4)
    assert type(error) is kind
    assert str(error) == "rank 1 of 4: images must be finite"


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ZeroDivisionError("division by zero"), "ZeroDivisionError: division by zero"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
        (FileNotFoundError(2, "No such file", "a.npz"), "FileNotFoundError: a.npz: No such file"),
    ],
)
def test_any_other_error_is_a_failed_rank(error, text):
    found = decoded(encoded(error), 1, 4)
    assert type(found) is FailedRankError
    assert str(found) == f"rank 1 of 4 failed: {text}"


@pytest.mark.parametrize(
    "text",
    [
        "[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [::1]:1",
        "Read error [127.0.0.1]:2: Connection reset by peer",
        "writev [127.0.0.1]:2: Broken pipe",
        "Timed out waiting 1800000ms for recv operation to complete",
        "NCCL error: remote process exited or there was a network error",
        "NCCL communicator was aborted on rank 0.",
    ],
)
def test_errors_that_mean_a_lost_peer(text):
    assert is_loss(RuntimeError(text))


@pytest.mark.parametrize(
    "text",
    [
        "No backend type associated with device type mps",
        "Tensors must be contiguous",
        "CUDA error: an illegal memory access was encountered",
        "output tensor must have the same type as input tensor",
        "",
    ],
)
def test_other_errors_of_a_collective_keep_their_message(monkeypatch, text):
    error = RuntimeError(text)

    def fail(*_, **__):
        raise error

    assert not is_loss(error)
    monkeypatch.setattr(dist, "all_reduce", fail)
    with pytest.raises(RuntimeError) as caught:
        Ranks().all_reduce(torch.zeros(2, dtype=torch.int64).numpy())
    assert caught.value is error


def test_the_error_of_a_lost_peer_has_its_cause(monkeypatch):
    error = RuntimeError("Connection closed by peer [127.0.0.1]:1\nmore")

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(dist, "broadcast", fail)
    with pytest.raises(LostRankError, match=r"rank 0 of 1: .*closed by peer") as caught:
        Ranks().broadcast(torch.zeros(2), 0, "weights")
    assert caught.value.__cause__ is error
    assert is_told(caught.value)


def test_memory_that_runs_out_in_a_collective_is_no_lost_peer(monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory; timeout of 1 s")

    monkeypatch.setattr(dist, "reduce", fail)
    with pytest.raises(torch.OutOfMemoryError):
        Ranks().reduce(torch.zeros(2), 0)


def test_an_error_of_all_ranks_is_as_in_one_process():
    with pytest.raises(DataError, match=r"^samples must be at most 4"):
        fastsal.distributed.collect(
            torch.nn.Linear(3, 2), [(torch.randn(4, 3), torch.zeros(4).long())], samples=9
        )


@pytest.mark.parametrize("kind", [LostRankError, FailedRankError])
def test_the_command_ends_with_one_line(kind):
    group = Group()

    @group.command()
    def run():
        raise kind("rank 0 of 2: another rank\nended")

    ended = CliRunner().invoke(click.version_option("1")(group), ["run"])
    assert ended.exit_code == STATUS_ERROR
    assert ended.output == "error: rank 0 of 2: another rank ended\n"
    assert not isinstance(ended.exception, kind)
