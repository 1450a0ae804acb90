"""A killed run goes on where it was, to the same end; files of other runs are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import fastsal
import fastsal.pruning.step
from fastsal.errors import FileFormatError, InvalidArgument


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


def halved(outputs, labels):
    return nn.functional.cross_entropy(outputs, labels, reduction="none") / 2


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({"rounds": 5}, "rounds"),
        ({"damping": 1e-3}, "damping"),
        ({"loss": halved}, "loss"),
        ({"autocast": torch.bfloat16}, "autocast"),
        ({"micro_batch": 8}, "micro_batch"),
        ({"loss_scale": 2.0}, "loss_scale"),
        ({"curvature": "sampled"}, "curvature"),
        ({"recalibrate": True}, "recalibrate"),
    ],
)
def test_other_arguments_are_refused(data, left_over, given, name):
    model = make()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    said = f"^checkpoint: .* with other values of {name}; pass the same arguments"
    with pytest.raises(FileFormatError, match=said):
        prune(model, data, left_over, **given)
    assert all(v.equal(before[k]) for k, v in model.state_dict().items())


def test_another_loss_function_is_refused(data, tmp_path, monkeypatch):
    path = tmp_path / "round.safetensors"

    def scaled(factor):
        return lambda out, y: factor * nn.functional.cross_entropy(out, y, reduction="none")

    with monkeypatch.context() as patch:
        kill_in_round(patch, 3)
        with pytest.raises(Killed):
            prune(make(), data, path, loss=scaled(1.0))
    with pytest.raises(FileFormatError, match="with other values of loss"):
        prune(make(), data, path, loss=scaled(2.0))
    prune(make(), data, path, loss=scaled(1.0))


def other_pixel(x, y):
    x = x.clone()
    x[5, 0, 0, 0] += 1e-6
    return [(x, y)]


OTHER_DATA = {
    "a pixel": other_pixel,
    "a label": lambda x, y: [(x, torch.cat([(y[:1] + 1) % 4, y[1:]]))],
    "labels of other images": lambda x, y: [(x, y.roll(1))],
    "fewer": lambda x, y: [(x[:60], y[:60])],
    "twice": lambda x, y: [(x, y), (x, y)],
}


@pytest.mark.parametrize("name", OTHER_DATA)
def test_other_data_is_refused(name, data, left_over):
    model = make()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(FileFormatError, match="^checkpoint: .* a run with other batches"):
        prune(model, OTHER_DATA[name](*data[0]), left_over)
    assert all(v.equal(before[k]) for k, v in model.state_dict().items())


def test_order_and_size_of_batches_are_not_other_data(data, left_over):
    x, y = data[0]
    order = torch.randperm(64)
    batches = list(zip(x[order].split(10), y[order].split(10)))
    prune(make(), batches, left_over)
    assert not left_over.exists()


class Augmented:
    """Other pixels on every pass, as random crops give."""

    def __init__(self, data, seed):
        self.data = data
        self.noise = torch.Generator().manual_seed(seed)

    def __iter__(self):
        for x, y in self.data:
            yield x + torch.randn(x.shape, generator=self.noise), y


@pytest.mark.parametrize("number", [2, 3])
def test_images_that_change_on_every_pass_are_resumed(number, data, tmp_path, monkeypatch):
    path = tmp_path / "round.safetensors"
    with monkeypatch.context() as patch:
        kill_in_round(patch, number)
        with pytest.raises(Killed):
            prune(make(), Augmented(data, 0), path, damping=1e-3)
    if number == 2:  # of one pass it is not known that they change
        with pytest.warns(UserWarning, match="batches yield other images on every pass"):
            prune(make(), Augmented(data, 1), path, damping=1e-3)
    else:
        prune(make(), Augmented(data, 1), path, damping=1e-3)
    assert not path.exists()


def test_another_model_with_the_same_weights_is_refused(data, left_over):
    other = make()
    other[2] = nn.GELU()
    with pytest.raises(FileFormatError, match="of another model"):
        prune(other, data, left_over)
    other = make()
    with torch.no_grad():
        other[3].bias += 1
    with pytest.raises(FileFormatError, match="from other weights"):
        prune(other, data, left_over)


def test_a_checkpoint_that_cannot_be_written_is_told_at_once(data, tmp_path):
    (tmp_path / "file").write_text("")
    seen = []
    with pytest.raises(InvalidArgument, match=r"^checkpoint: .* cannot be written"):
        prune(make(), data, tmp_path / "file" / "round", progress=lambda *_: seen.append(1))
    assert seen == []


def test_a_checkpoint_that_cannot_be_removed_loses_nothing(data, tmp_path, monkeypatch):
    path = tmp_path / "round.safetensors"

    def fail(self, missing_ok=False):
        if self == path:
            raise PermissionError(1, "Operation not permitted", str(self))
        return unlink(self, missing_ok)

    unlink = Path.unlink
    monkeypatch.setattr(Path, "unlink", fail)
    model = make()
    with pytest.warns(UserWarning, match="cannot be removed .Operation not permitted"):
        result = prune(model, data, path, damping=1e-3)
    result.masks.verify(model)


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
