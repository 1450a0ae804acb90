"""A refit that was stopped goes on where it was, to the same end; other files are refused."""

from __future__ import annotations

import pytest
import torch

import fastsal
from fastsal import Refit
from fastsal.errors import FileFormatError

from .test_prune_and_refit import HOW, dense
from .test_refit import pruned, same, state

pytestmark = pytest.mark.usefixtures("one_thread")


class Stopped(Exception):
    pass


def stop_at(step):
    def report(done, total):
        if done == step:
            raise Stopped

    return report


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(16, 3, 8, 8, generator=generator), torch.arange(16) % 4) for _ in range(6)]


HOWS = {
    "fixed rate": Refit(steps=20, batch_size=16, lr=5e-3, checks=5),
    "chosen rate": Refit(steps=20, batch_size=16, checks=5),
    "rate that falls": Refit(steps=24, batch_size=16, checks=6),
    "small batches of a micro-batch": Refit(steps=20, batch_size=24, micro_batch=7, checks=4),
    "patience": Refit(steps=40, batch_size=16, lr=1.0, checks=20, patience=8),
}


@pytest.mark.parametrize("name", HOWS)
@pytest.mark.parametrize("step", [1, 9, 14])
def test_it_ends_as_if_it_had_not_been_stopped(data, tmp_path, monkeypatch, name, step):
    how, path = HOWS[name], tmp_path / "refit.pt"
    if name == "rate that falls":
        monkeypatch.setattr("fastsal.pruning.refit.fitting._MULTIPLE", 3000.0)
    model, original, masks = pruned()
    expected = fastsal.refit(model, original, data, masks, how)
    whole = state(model)
    if name == "rate that falls":
        assert expected.history[0]["held_out_error"] > 1.5 * expected.before
    model, original, masks = pruned()
    before = state(model)
    with pytest.raises(Stopped):
        fastsal.refit(model, original, data, masks, how, checkpoint=path, progress=stop_at(step))
    assert same(before, state(model))
    assert path.exists() == (step >= 4)
    found = fastsal.refit(model, original, data, masks, how, checkpoint=path)
    assert same(whole, state(model))
    assert not path.exists()
    assert found.history == expected.history
    assert (found.before, found.after, found.kept_step, found.steps, found.lr) == (
        expected.before, expected.after, expected.kept_step, expected.steps, expected.lr,
    )  # fmt: skip


def test_files_of_others_are_refused(data, tmp_path):
    how, path = HOWS["fixed rate"], tmp_path / "refit.pt"
    model, original, masks = pruned()
    with pytest.raises(Stopped):
        fastsal.refit(model, original, data, masks, how, checkpoint=path, progress=stop_at(9))
    before, content = state(model), path.read_bytes()

    def again(said, images=data, settings=how, seed=0, net=model, held_out=None):
        with pytest.raises(FileFormatError, match=said):
            fastsal.refit(
                net, original, images, masks, settings, checkpoint=path, seed=seed,
                held_out=held_out,
            )  # fmt: skip

    again("other values of lr", settings=Refit(steps=20, batch_size=16, lr=1e-3, checks=5))
    again("other values of seed", seed=1)
    again("other (batches|held_out)", held_out=[(x + 1, y) for x, y in data[:1]])
    again("other batches", images=[(x + 1, y) for x, y in data])
    other, _, _ = pruned()
    with torch.no_grad():
        other.fc.bias.add_(1)
    again("other weights", net=other)
    path.write_bytes(content[:-500])
    again("checkpoint")
    assert same(before, state(model))


@pytest.mark.parametrize("step", [2, 14])
@pytest.mark.parametrize("between", [False, True])
def test_prune_goes_on_in_its_refit(data, tmp_path, between, step):
    file = tmp_path / "state.safetensors"
    how = {
        **HOW,
        "rounds": 2,
        "refit": Refit(steps=20, batch_size=16, lr=5e-3, checks=5, between_rounds=between),
    }
    whole, cut = dense(), dense()
    expected = fastsal.prune(whole, data, 0.8, **how)
    before = state(cut)
    seen = []

    def report(done, total):
        seen.append(total)
        if total == 20 and done == step:
            raise Stopped

    with pytest.raises(Stopped):
        fastsal.prune(cut, data, 0.8, **how, checkpoint=file, progress=report)
    assert same(before, state(cut))
    assert file.exists()
    beside = tmp_path / "state.safetensors.refit"
    assert beside.exists() == (step == 14)
    seen.clear()
    found = fastsal.prune(
        cut, data, 0.8, **how, checkpoint=file, progress=lambda d, t: seen.append(t)
    )
    assert same(state(whole), state(cut))
    assert not list(tmp_path.iterdir())
    assert [entry.round for entry in found.history] == [1, 2]
    for old, new in zip(expected.history, found.history, strict=True):
        assert (old.refit is None) == (new.refit is None)
        if old.refit is not None:
            assert old.refit.history == new.refit.history
    for name, scores in expected.scores.items():
        assert torch.equal(found.scores[name], scores)
    # What was done is not done again.
    assert seen.count(20) == (20 if between else 0) + (20 if step == 2 else 8)
    found.masks.verify(cut)
