"""A killed run goes on where it was, to the same end; files of other runs are refused."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import fastsal
import fastsal.pruning.step
from fastsal.errors import FileFormatError


class Killed(Exception):
    pass


def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(27, 16), nn.ReLU(), nn.Linear(16, 4))


@pytest.fixture
def data():
    torch.manual_seed(1)
    return [(torch.randn(64, 3, 3, 3), torch.randint(0, 4, (64,)))]


def prune(model, data, path, **given):
    given = {"rounds": 4, "damping": "auto", **given}
    return fastsal.prune(model, data, 0.8, checkpoint=path, **given)


def kill_in_round(monkeypatch, number):
    """Let everything of a later round fail."""
    run = fastsal.pruning.step.Step.run
    seen = []

    def counted(self, fisher, masks, goal, damping):
        seen.append(0 if masks is None else masks.sparsity)
        if len(set(seen)) == number:
            raise Killed
        return run(self, fisher, masks, goal, damping)

    monkeypatch.setattr(fastsal.pruning.step.Step, "run", counted)


@pytest.mark.parametrize("number", [2, 4])
def test_a_killed_run_ends_as_if_it_had_not_been(data, tmp_path, monkeypatch, number):
    path = tmp_path / "round.safetensors"
    whole = make()
    expected = fastsal.prune(whole, data, 0.8, rounds=4)
    model = make()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with monkeypatch.context() as patch:
        kill_in_round(patch, number)
        with pytest.raises(Killed):
            prune(model, data, path)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert path.exists()
    result = prune(model, data, path)
    assert not path.exists()
    for name in expected.masks:
        assert torch.equal(result.masks[name], expected.masks[name])
    for old, new in zip(whole.parameters(), model.parameters()):
        assert torch.equal(old, new)
    assert [h.round for h in result.history] == [1, 2, 3, 4]
    assert [h.damping for h in result.history] == [h.damping for h in expected.history]
    result.masks.verify(model)


@pytest.fixture
def left_over(data, tmp_path, monkeypatch):
    path = tmp_path / "round.safetensors"
    with monkeypatch.context() as patch:
        kill_in_round(patch, 3)
        with pytest.raises(Killed):
            prune(make(), data, path)
    return path


@pytest.mark.parametrize(
    ("given", "match"), [({"rounds": 5}, "rounds"), ({"damping": 1e-3}, "damping")]
)
def test_other_arguments_are_refused(data, left_over, given, match):
    with pytest.raises(FileFormatError, match=match):
        prune(make(), data, left_over, **given)


def test_other_weights_are_refused(data, left_over):
    model = make()
    with torch.no_grad():
        model[1].weight[0, 0] += 1
    before = model[1].weight.detach().clone()
    with pytest.raises(FileFormatError, match="other weights"):
        prune(model, data, left_over)
    assert torch.equal(model[1].weight, before)


def test_damaged_files_are_refused(data, left_over):
    content = left_over.read_bytes()
    left_over.write_bytes(content[: len(content) // 2])
    with pytest.raises(FileFormatError, match="checkpoint"):
        prune(make(), data, left_over)
    left_over.write_bytes(b"something else")
    with pytest.raises(FileFormatError, match="checkpoint"):
        prune(make(), data, left_over)


def test_a_file_that_lacks_a_mask_leaves_the_model_as_it_was(data, left_over):
    with safe_open(left_over, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    del tensors["mask:3.weight"]
    save_file(tensors, left_over, metadata=metadata)
    model = make()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(FileFormatError, match=r"checkpoint.*mask:3\.weight"):
        prune(model, data, left_over)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_weights_of_half_precision(data, tmp_path, monkeypatch):
    path = tmp_path / "round.safetensors"
    data = [(x.bfloat16(), y) for x, y in data]
    model, whole = make().bfloat16(), make().bfloat16()
    expected = fastsal.prune(whole, data, 0.8, rounds=4)
    with monkeypatch.context() as patch:
        kill_in_round(patch, 3)
        with pytest.raises(Killed):
            prune(model, data, path)
    with safe_open(path, framework="pt") as file:
        assert file.get_tensor("weight:1.weight").dtype == torch.bfloat16
    assert prune(model, data, path).masks == expected.masks
    assert all(map(torch.equal, model.parameters(), whole.parameters()))
