"""`prune(refit=...)`: the stage after pruning, between rounds, within a budget, and undone."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

import fastsal
from fastsal import Refit
from fastsal.errors import InvalidArgument
from fastsal.pruning.history import Round

from .test_refit import Net, same, state

pytestmark = pytest.mark.usefixtures("one_thread")

FAST = Refit(steps=20, batch_size=16, lr=5e-3)
HOW = {"damping": 1e-3, "curvature": "features", "parameters": ["stem*", "blocks*conv*"]}


def dense():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net().eval()


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(16, 3, 8, 8, generator=generator), torch.arange(16) % 4) for _ in range(6)]


def mismatch(model, data):
    """What a refit lowers: relative squared errors of blocks and features, half each."""
    images = torch.cat([x for x, _ in data])

    def outputs(net):
        first = net.blocks[0](net.stem(images))
        return first, net.blocks[1](first), net.forward_features(images)

    with torch.no_grad():
        *blocks, (a, b) = zip(outputs(model), outputs(dense()), strict=True)
        of_features = float((a - b).square().sum() / (b - b.mean(0)).square().sum())
        of_blocks = [float((a - b).square().sum() / b.square().sum()) for a, b in blocks]
        return (of_features + sum(of_blocks) / 2) / 2


@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("criterion", ["obs-greedy", "magnitude"])
def test_a_refitted_model_is_nearer_to_the_dense_one(data, rounds, criterion):
    plain, refitted = dense(), dense()
    compensate = criterion != "magnitude"
    how = HOW | {"criterion": criterion, "compensate": compensate, "rounds": rounds}
    fastsal.prune(plain, data, 0.7, **how)
    result = fastsal.prune(refitted, data, 0.7, **how, refit=FAST)
    result.masks.verify(refitted)
    assert mismatch(refitted, data) < 0.9 * mismatch(plain, data)
    *before, last = result.history
    assert all(entry.refit is None for entry in before)
    assert last.refit.kept
    assert last.refit.after < last.refit.before
    assert "refit" in last.seconds
    assert result.masks.recipe["refit"]["steps"] == 20


def test_history_survives_json(data):
    result = fastsal.prune(dense(), data, 0.5, **HOW, refit=FAST)
    entry = result.history[-1]
    assert Round.from_dict(json.loads(json.dumps(entry.as_dict()))).refit == entry.refit


def test_between_rounds_every_round_is_refitted(data):
    how = Refit(steps=10, batch_size=16, lr=5e-3, between_rounds=True)
    model = dense()
    result = fastsal.prune(model, data, 0.8, **HOW, rounds=3, recalibrate=True, refit=how)
    assert [entry.refit is not None for entry in result.history] == [True] * 3
    assert [entry.recalibration is not None for entry in result.history] == [False, False, True]
    result.masks.verify(model)


def test_a_rerun_resumes_with_the_refitted_weights(data, tmp_path, monkeypatch):
    how = HOW | {"rounds": 3, "refit": Refit(steps=6, batch_size=16, lr=5e-3, between_rounds=True)}
    whole = dense()
    fastsal.prune(whole, data, 0.8, **how)
    file, cut = tmp_path / "state", dense()
    before, rounds = state(cut), []

    def stop(*_args, **_options):
        rounds.append(1)
        if len(rounds) == 3:
            raise KeyboardInterrupt
        return refit_on(*_args, **_options)

    from fastsal.pruning.refit import stage

    refit_on = stage.refit_on
    with monkeypatch.context() as patch:
        patch.setattr(stage, "refit_on", stop)
        with pytest.raises(KeyboardInterrupt):
            fastsal.prune(cut, data, 0.8, **how, checkpoint=file)
    assert same(state(cut), before)
    fastsal.prune(cut, data, 0.8, **how, checkpoint=file)
    assert same(state(cut), state(whole))
    assert not file.exists()


@pytest.mark.parametrize("step", [1, 6])
@pytest.mark.parametrize("rounds", [1, 2])
def test_an_interrupt_between_two_steps_restores_everything(data, rounds, step):
    model = dense()
    before = state(model)

    def report(done, total):
        if total == FAST.steps and done == step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        fastsal.prune(model, data, 0.7, **HOW, rounds=rounds, refit=FAST, progress=report)
    assert same(state(model), before)
    del caught  # its traceback keeps everything that was running
    assert same(state(model), before)


def test_an_error_after_refitting_restores_everything(data, monkeypatch):
    from fastsal.pruning.recipe import Recipe

    def fail(*_args, **_options):
        raise RuntimeError("no disk")

    monkeypatch.setattr(Recipe, "sign", fail)
    model = dense()
    before = state(model)
    with pytest.raises(RuntimeError, match="no disk"):
        fastsal.prune(model, data, 0.7, **HOW, recalibrate=True, refit=FAST)
    assert same(state(model), before)


def test_refitting_within_a_budget(data):
    models = dense(), dense()
    fastsal.prune(models[0], data, 0.7, **HOW, refit=FAST)
    result = fastsal.prune(models[1], data, 0.7, **HOW, refit=FAST, memory_budget="256MiB")
    assert result.history[-1].refit.kept
    result.masks.verify(models[1])


def test_a_budget_without_room_says_how_much_is_needed(data):
    model = dense()
    before = state(model)
    with pytest.raises(InvalidArgument, match="memory_budget must be more than .* with refit"):
        fastsal.prune(model, data, 0.7, **HOW, refit=FAST, memory_budget="8KiB")
    assert same(state(model), before)


class Uncopied(Net):
    def __deepcopy__(self, memo):
        raise TypeError("no copy")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"refit": "layers"}, "windows must be 'blocks', 'whole' or names of modules"),
        ({"refit": Refit(steps=0)}, "steps must be"),
        ({"refit": Refit(between_rounds=1)}, "between_rounds must be True or False, got 1"),
        ({"refit": Refit(micro_batch=0)}, "micro_batch must be"),
        ({"refit": FAST, "max_accuracy_drop": 0.1, "sparsity": None}, "exclude refit"),
    ],
)
def test_invalid_arguments(data, options, message):
    model = dense()
    before = state(model)
    with pytest.raises(InvalidArgument, match=message):
        fastsal.prune(model, data, **({"sparsity": 0.5} | HOW | options))
    assert same(state(model), before)


def test_images_that_come_once_are_refused(data):
    with pytest.raises(InvalidArgument, match="iterable several times"):
        fastsal.prune(dense(), iter(data), 0.5, **HOW, refit=FAST)


def test_a_model_that_cannot_be_copied_is_refused(data):
    with pytest.raises(InvalidArgument, match="deepcopy can copy for refit"):
        fastsal.prune(Uncopied().eval(), data, 0.5, **HOW, refit=FAST)


def test_micro_batches_add_up(data):
    """A step over micro-batches is that over the whole batch, in float64 to the last digits."""
    found = []
    for micro_batch in (16, 5):
        model = dense().double()
        batches = [(x.double(), y) for x, y in data]
        how = Refit(steps=4, batch_size=16, lr=5e-3, micro_batch=micro_batch)
        result = fastsal.prune(model, batches, 0.7, **HOW, refit=how)
        assert result.history[-1].refit.micro_batch == micro_batch
        found.append(state(model))
    assert all(torch.allclose(a, found[1][n], rtol=1e-7, atol=1e-9) for n, a in found[0].items())


def test_the_micro_batch_follows_from_the_memory_of_activations(data):
    from fastsal.models.evaluating import evaluating
    from fastsal.pruning.refit.matching import Matching

    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(10, 1000), nn.Linear(1000, 2)

        def forward(self, x):
            return self.second(torch.tanh(self.first(x)))

    model = Wide()
    masks = fastsal.Masks({"first.weight": torch.ones(1000, 10, dtype=torch.bool)})
    held = [(torch.randn(8, 10), None)]
    with evaluating(model):
        matching = Matching(model, copy.deepcopy(model), [], masks, None, held)
        # tanh's output, the features, their difference and its square; dense outputs, twice.
        each = 4 * 1000 * 6
        assert matching.micro_batch(64, 12 * each) in range(8, 25)
        assert matching.micro_batch(4, 10**9) == 4
        with pytest.raises(InvalidArgument, match="memory_budget must leave"):
            matching.micro_batch(4, 100)
