"""A killed fine-tuning goes on where it was, to the same bits; files of other runs are refused."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastsal
import fastsal.finetuning.trainer
from fastsal import Masks
from fastsal.errors import FileFormatError

pytestmark = pytest.mark.usefixtures("one_thread")


def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Dropout(0.2),
            nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4),
        )  # fmt: skip


def examples(seed):
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(48, 3, 4, 4, generator=generator), torch.arange(48) % 4
    return x + y[:, None, None, None], y


@pytest.fixture
def data():
    return DataLoader(TensorDataset(*examples(1)), batch_size=16, shuffle=True)


def finetune(model, data, **given):
    masks = Masks({"4.weight": torch.arange(16 * 32).reshape(16, 32) % 3 > 0})
    return fastsal.finetune(model, data, masks, **{"epochs": 3, "lr": 0.05, **given})


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(model, want):
    assert all(value.equal(want[name]) for name, value in model.state_dict().items())


def overflowing(outputs, labels):
    """The first steps are skipped, until the scale, which is part of the state, is small."""
    return 500 * nn.functional.cross_entropy(outputs, labels, reduction="none")


class Killed(Exception):
    pass


def kill_in_epoch(monkeypatch, number):
    epoch = fastsal.finetuning.trainer.Trainer.epoch

    def until(self, now, report):
        if now == number:
            raise Killed
        return epoch(self, now, report)

    monkeypatch.setattr(fastsal.finetuning.trainer.Trainer, "epoch", until)


def killed(model, data, path, monkeypatch, number=3, **given):
    with monkeypatch.context() as patch:
        kill_in_epoch(patch, number)
        with pytest.raises(Killed):
            finetune(model, data, checkpoint=path, **given)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"optimizer": "adamw", "weight_decay": 0.1, "train_normalization": True},
        {"autocast": torch.float16, "loss": overflowing, "lr": 1e-4},
        {"optimizer": "lookahead_sgd"},
        {"held_out": [examples(2)], "patience": 2},
    ],
)
def test_a_killed_run_ends_as_if_it_had_not_been(given, data, tmp_path, monkeypatch):
    path = tmp_path / "epoch.pt"
    given = {"epochs": 5, **given}
    whole, model = net(), net()
    expected = finetune(whole, data, **given)
    before = state(model)
    killed(model, data, path, monkeypatch, **given)
    assert_same(model, before)
    result = finetune(model, data, checkpoint=path, **given)
    assert_same(model, state(whole))
    assert result.kept_epoch == expected.kept_epoch
    assert [{**line, "seconds": 0} for line in result.history] == [
        {**line, "seconds": 0} for line in expected.history
    ]
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def left_over(data, tmp_path, monkeypatch):
    path = tmp_path / "epoch.pt"
    killed(net(), data, path, monkeypatch)
    return path


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({"lr": 0.1}, "lr"),
        ({"epochs": 9}, "epochs"),
        ({"frozen": "0.bias"}, "frozen"),
        ({"loss": overflowing}, "loss"),
        ({"autocast": torch.bfloat16}, "autocast"),
    ],
)
def test_checkpoints_of_other_arguments(given, name, data, left_over):
    with pytest.raises(
        FileFormatError, match=f"^checkpoint: .* with other values of {name}; pass the same"
    ):
        finetune(net(), data, checkpoint=left_over, **given)


def test_checkpoints_of_other_weights_and_masks(data, left_over):
    model = net()
    with torch.no_grad():
        model[0].bias[0] += 1
    before = state(model)
    with pytest.raises(
        FileFormatError, match="^checkpoint: .* belongs to a run from other weights"
    ):
        finetune(model, data, checkpoint=left_over)
    assert_same(model, before)
    masks = Masks({"6.weight": torch.ones(4, 16)})
    with pytest.raises(FileFormatError, match="belongs to a run from other weights"):
        fastsal.finetune(net(), data, masks, epochs=3, lr=0.05, checkpoint=left_over)


def test_damaged_checkpoints(data, left_over):
    whole = left_over.read_bytes()
    for content in (b"", b"something else", whole[: len(whole) // 2]):
        left_over.write_bytes(content)
        with pytest.raises(FileFormatError, match="^checkpoint: "):
            finetune(net(), data, checkpoint=left_over)
    for value in ([1], {"format": "other"}):
        torch.save(value, left_over)
        with pytest.raises(
            FileFormatError, match="^checkpoint: .* is not a checkpoint of finetune"
        ):
            finetune(net(), data, checkpoint=left_over)


def loader(x, y, size=16):
    return DataLoader(TensorDataset(x, y), batch_size=size, shuffle=True)


def test_checkpoints_of_other_data(data, left_over):
    x, y = examples(1)
    model = net()
    before = state(model)
    for other in ((x + 1e-3, y), (x, y.flip(0)), (x.flip(0), y)):
        with pytest.raises(FileFormatError, match="^checkpoint: .* with other batches"):
            finetune(model, loader(*other), checkpoint=left_over)
        assert_same(model, before)
    with pytest.raises(FileFormatError, match="other values of number of batches"):
        finetune(model, loader(x, y, 12), checkpoint=left_over)
    assert_same(model, before)
    finetune(model, loader(x, y), checkpoint=left_over)
    assert not left_over.exists()


def test_checkpoints_of_other_held_out_images(data, tmp_path, monkeypatch):
    path = tmp_path / "epoch.pt"
    killed(net(), data, path, monkeypatch, held_out=[examples(2)])
    with pytest.raises(FileFormatError, match="^checkpoint: .* with other held_out"):
        finetune(net(), data, checkpoint=path, held_out=[examples(3)])
    finetune(net(), data, checkpoint=path, held_out=[examples(2)])


def test_another_architecture_with_the_same_weights(data, left_over):
    model = net()
    model[5] = nn.GELU()
    with pytest.raises(FileFormatError, match="of another model"):
        finetune(model, data, checkpoint=left_over)


class Noisy(TensorDataset):
    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return x + torch.randn_like(x) / 10, y


@pytest.mark.parametrize("number", [2, 3])
def test_augmented_images(number, tmp_path, monkeypatch):
    """Their random numbers are those of the seed, so that a resumed run has the same bits."""
    path = tmp_path / "epoch.pt"
    noisy = DataLoader(Noisy(*examples(1)), batch_size=16, shuffle=True)
    whole, model = net(), net()
    finetune(whole, noisy)
    killed(model, noisy, path, monkeypatch, number)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "batches yield other images on every pass")
        finetune(model, noisy, checkpoint=path)
    assert_same(model, state(whole))


def test_resuming_leaves_the_random_numbers_of_the_caller(data, left_over):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    finetune(net(), data, checkpoint=left_over)
    assert torch.equal(torch.rand(3), expected)
