"""Copies that undo a block: blocks may be nested, in memory and in a scratch folder."""

from __future__ import annotations

import copy
import signal

import pytest
import torch
from torch import nn

import fastsal
from fastsal.pruning.shelf import Shelf, all_or_nothing

pytestmark = pytest.mark.usefixtures("one_thread")


class Net(nn.Module):
    """Raises in a given call, counted from 1."""

    def __init__(self, raises_in=None):
        super().__init__()
        self.stem, self.hidden, self.fc = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.calls, self.raises_in = 0, raises_in

    def forward(self, x):
        self.calls += 1
        if self.calls == self.raises_in:
            raise KeyboardInterrupt
        return self.fc(torch.relu(self.hidden(torch.relu(self.stem(x)))))


def seeded():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return Net()


def batches():
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(64, 6, generator=generator), None) for _ in range(2)]


@pytest.mark.parametrize("on_disk", [True, False])
def test_nested_blocks_have_their_own_copies(tmp_path, on_disk):
    shelf = Shelf(tmp_path if on_disk else None)
    tensors = {"a": torch.ones(3)}

    def fail_inside():
        with all_or_nothing(tensors, shelf) as inner:
            tensors["a"].fill_(3)
            assert torch.equal(inner["a"], torch.full((3,), 2.0))
            raise ZeroDivisionError

    def fail_outside():
        with all_or_nothing(tensors, shelf) as outer:
            tensors["a"].fill_(2)
            with pytest.raises(ZeroDivisionError):
                fail_inside()
            assert torch.equal(tensors["a"], torch.full((3,), 2.0))
            assert torch.equal(outer["a"], torch.ones(3))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail_outside()
    assert torch.equal(tensors["a"], torch.ones(3))


@pytest.mark.usefixtures("ctrl_c")
def test_a_second_ctrl_c_does_not_end_the_restoration():
    class Interrupts(dict):
        def __getitem__(self, name):
            if self.stops:
                signal.raise_signal(signal.SIGINT)
            return super().__getitem__(name)

    tensors = Interrupts(a=torch.ones(3), b=torch.ones(3))
    tensors.stops = False

    def stopped():
        with all_or_nothing(tensors):
            for tensor in tensors.values():
                tensor.fill_(2)
            tensors.stops = True
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert all(torch.equal(tensor, torch.ones(3)) for tensor in tensors.values())


def test_reconstruction_is_the_same_with_a_scratch_folder(tmp_path):
    given = {"sparsity": 0.6, "rounds": 2}
    plain, scratch = seeded(), seeded()
    expected = fastsal.prune(plain, batches(), **given)
    within = {"memory_budget": "4GiB", "scratch": tmp_path}
    found = fastsal.prune(scratch, batches(), **given, **within)
    assert expected.history[-1].reconstruction.kept
    assert found.history[-1].reconstruction == expected.history[-1].reconstruction
    for name, value in plain.state_dict().items():
        assert torch.equal(value, scratch.state_dict()[name])


def test_an_error_in_any_pass_restores_the_model_with_a_scratch_folder(tmp_path):
    given = {"sparsity": 0.6, "rounds": 2, "memory_budget": "4GiB", "scratch": tmp_path}
    model = seeded()
    fastsal.prune(model, batches(), **given)
    for call in range(model.calls, model.calls // 2, -3):
        stopped = seeded()
        stopped.raises_in = call
        start = copy.deepcopy(stopped.state_dict())
        with pytest.raises(KeyboardInterrupt):
            fastsal.prune(stopped, batches(), **given)
        for name, value in stopped.state_dict().items():
            assert torch.equal(value, start[name]), (call, name)
