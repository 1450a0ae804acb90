"""Fine-tuning: zeros and frozen parts stay, the best epoch is kept, errors change nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastsal
import fastsal.finetuning.trainer
from fastsal import Masks
from fastsal.errors import (
    DataError,
    InvalidArgument,
    MaskError,
    NonFiniteLoss,
    UnknownParameter,
)

pytestmark = pytest.mark.usefixtures("one_thread")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.bn = nn.BatchNorm2d(8)
        self.mix = nn.Linear(32, 16)
        self.drop = nn.Dropout(0.2)
        self.fc = nn.Linear(16, 4)

    def forward(self, x):
        x = torch.relu(self.bn(self.conv(x))).flatten(1)
        return self.fc(self.drop(torch.relu(self.mix(x))))


def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net()


def some_masks():
    generator = torch.Generator().manual_seed(1)
    owned = dict(net().named_parameters())
    names = ["conv.weight", "mix.weight", "fc.weight"]
    return Masks({n: torch.rand(owned[n].shape, generator=generator) < 0.6 for n in names})


def examples(seed, n=48):
    """Classes that differ by the mean of a channel."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 4
    x = torch.randn(n, 3, 4, 4, generator=generator)
    x[:, :2] += torch.stack([y % 2, y // 2], 1)[:, :, None, None] * 2.0
    return x, y


@pytest.fixture
def data():
    return DataLoader(TensorDataset(*examples(1)), batch_size=16, shuffle=True)


@pytest.fixture
def held_out():
    return [examples(2)]


def finetune(model, data, **given):
    return fastsal.finetune(model, data, some_masks(), **{"epochs": 3, "lr": 0.05, **given})


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(model, before):
    return {name for name, value in model.state_dict().items() if not value.equal(before[name])}


def flags(model):
    return (
        [m.training for m in model.modules()],
        [(p.requires_grad, p.grad) for p in model.parameters()],
        [len(p._backward_hooks or ()) for p in model.parameters()],
    )


# ---------------------------------------------------------------------------- what it does


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adamw", "lookahead_adam"])
def test_it_learns_and_zeros_stay(optimizer, data, held_out):
    model, masks = net(), some_masks()
    before = state(model)
    lr = 0.02 if "adam" in optimizer else 0.2
    how = {"optimizer": optimizer, "lr": lr, "weight_decay": 0.01, "epochs": 12}
    result = finetune(model, data, held_out=held_out, **how)
    masks.verify(model)
    assert changed(model, before) >= {"conv.weight", "conv.bias", "mix.weight", "mix.bias"}
    line = result.history[result.kept_epoch - 1]
    assert line["held_out_loss"] < 0.8 * result.before
    x, y = held_out[0]
    found = nn.functional.cross_entropy(model.eval()(x), y).item()
    assert found == pytest.approx(line["held_out_loss"], rel=1e-5)


def test_history(data):
    result = finetune(net(), data, epochs=2)
    assert [line["epoch"] for line in result.history] == [1, 2]
    assert result.history[1]["loss"] < result.history[0]["loss"]
    assert all(line["held_out_loss"] is None for line in result.history)
    assert all(line["samples"] == 48 and line["seconds"] > 0 for line in result.history)
    assert (result.kept_epoch, result.before) == (2, None)


@pytest.mark.parametrize(
    ("given", "still"),
    [
        ({}, {"bn.weight", "bn.bias", "bn.running_mean", "fc.bias"}),
        ({"train_head": True}, {"bn.weight", "bn.bias", "bn.running_mean"}),
        ({"train_normalization": True}, {"fc.bias"}),
        ({"train_normalization": True, "frozen": "bn.*"}, {"bn.weight", "bn.running_var"}),
        ({"frozen": ["conv.*", "mix.bias"]}, {"conv.bias", "mix.bias", "bn.weight", "fc.bias"}),
    ],
)
def test_what_is_frozen_stays(given, still, data):
    """But for zeros: the masks are applied to frozen weights too."""
    model, masks = net(), some_masks()
    masks.apply(model)
    before = state(model)
    finetune(model, data, epochs=1, **given)
    moved = changed(model, before)
    assert not moved & still
    assert "mix.weight" in moved
    assert ("fc.weight" in moved) == ("fc.bias" in moved) == given.get("train_head", False)


def test_it_leaves_flags_modes_and_random_numbers(data):
    model = net()
    model.eval()
    model.bn.train()
    model.conv.bias.requires_grad_(False)
    model(torch.randn(2, 3, 4, 4)).sum().backward()
    before, bias = flags(model), model.conv.bias.clone()
    gradient = model.fc.weight.grad.clone()
    torch.manual_seed(5)
    finetune(model, data, epochs=1)
    assert torch.rand(1) == torch.rand(1, generator=torch.Generator().manual_seed(5))
    assert flags(model) == before
    assert torch.equal(model.conv.bias, bias)
    assert torch.equal(model.fc.weight.grad, gradient)


def test_a_seed_is_a_run(data):
    first, second, other = net(), net(), net()
    finetune(first, data)
    torch.manual_seed(9)
    finetune(second, data)
    finetune(other, data, seed=1)
    assert not changed(first, state(second))
    assert changed(first, state(other))


def test_each_epoch_has_an_order_of_its_own(data):
    model, seen = net(), []
    model.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    finetune(model, data, epochs=2)
    first, second = torch.cat(seen[:3]), torch.cat(seen[3:])
    assert not torch.equal(first, second)
    assert torch.equal(first.flatten().sort().values, second.flatten().sort().values)


def test_slow_and_obvious():
    """Plain SGD on weights that are multiplied by their mask, with a cosine an update."""
    model, slow, masks = net().double(), net().double(), some_masks()
    model.drop.p = slow.drop.p = 0.0
    x, y = examples(1)
    data = [(x[:24].double(), y[:24]), (x[24:].double(), y[24:])]
    result = finetune(model, data, optimizer="momentum", epochs=2)
    slow.bn.eval()
    for p in (*slow.bn.parameters(), *slow.fc.parameters()):
        p.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in slow.parameters() if p.requires_grad], 0.05, 0.9)
    rates = []
    for update, (x, y) in enumerate(data * 2):
        rates.append(0.05 * (1 + math.cos(math.pi * update / 4)) / 2)
        optimizer.param_groups[0]["lr"] = rates[-1]
        optimizer.zero_grad()
        weights = {n: p * masks[n] if n in masks else p for n, p in slow.named_parameters()}
        nn.functional.cross_entropy(torch.func.functional_call(slow, weights, x), y).backward()
        optimizer.step()
    masks.apply(slow)
    for want, p in zip(slow.parameters(), model.parameters()):
        torch.testing.assert_close(p, want)
    assert [line["lr"] for line in result.history] == pytest.approx(rates[::2])


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("cosine", [1.0, 0.75, 0.25]),
        ("linear", [1.0, 2 / 3, 1 / 3]),
        ("constant", [1.0, 1.0, 1.0]),
    ],
)
@pytest.mark.parametrize("has_length", [True, False])
def test_schedules(schedule, rates, has_length):
    batches = [examples(1)]

    class WithoutLength:
        def __iter__(self):
            return iter(batches)

    given = batches if has_length else WithoutLength()
    result = finetune(net(), given, schedule=schedule, lr=0.01)
    assert [line["lr"] for line in result.history] == pytest.approx([0.01 * r for r in rates])


def test_the_best_epoch_is_kept(data, held_out, monkeypatch):
    losses = iter([2.0, 1.5, math.nan, 1.4, 1.6, 1.4, 0.1])
    monkeypatch.setattr(fastsal.finetuning.trainer.Trainer, "mean_loss", lambda *_: next(losses))
    model = net()
    result = finetune(model, data, held_out=held_out, patience=2, epochs=9, schedule="constant")
    assert result.before == 2.0
    assert result.kept_epoch == 3
    assert [line["epoch"] for line in result.history] == [1, 2, 3, 4, 5]
    same = net()
    finetune(same, data, epochs=3, schedule="constant")
    assert not changed(model, state(same))


def test_weights_that_only_get_worse_are_not_kept(data, held_out):
    model, masked = net(), net()
    some_masks().apply(masked)
    result = finetune(model, data, held_out=held_out, lr=30.0, patience=1, epochs=2)
    assert (result.kept_epoch, len(result.history)) == (0, 1)
    assert result.history[0]["held_out_loss"] > result.before
    assert not changed(model, state(masked))


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_mixed_precision(autocast, data):
    model = net()
    seen = []
    model.fc.register_forward_hook(lambda m, args, out: seen.append(out.dtype))
    result = finetune(model, data, autocast=autocast)
    some_masks().verify(model)
    assert set(seen) == {autocast}
    assert result.history[-1]["loss"] < result.history[0]["loss"]


def test_other_losses(data):
    def loss(outputs, labels):
        return (outputs - nn.functional.one_hot(labels, 4)).square().sum(1)

    result = finetune(net(), data, loss=loss, lr=0.01)
    assert result.history[-1]["loss"] < result.history[0]["loss"]


def test_progress(data):
    seen = []
    finetune(net(), data, epochs=2, progress=lambda *told: seen.append(told))
    assert seen == [(n, None) for n in (16, 32, 48, 64, 80, 96)]


def test_a_compiled_model(data):
    model = net()
    finetune(torch.compile(model, backend="eager"), data, epochs=1)
    some_masks().verify(model)
    plain = net()
    finetune(plain, data, epochs=1)
    assert not changed(model, state(plain))


def test_masks_of_frozen_weights(data):
    model = net()
    masks = Masks({"fc.weight": some_masks()["fc.weight"]})
    fastsal.finetune(model, data, masks, epochs=1, lr=0.1)
    masks.verify(model)


def test_one_pass_over_an_iterator(held_out):
    result = finetune(net(), iter([examples(1)]), epochs=1, held_out=held_out)
    assert len(result.history) == 1


# ------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"epochs": 0}, InvalidArgument, "^epochs must be at least 1, got 0"),
        ({"lr": 0.0}, InvalidArgument, "^lr must be positive, got 0.0"),
        ({"lr": math.nan}, InvalidArgument, "^lr must be positive, got nan"),
        ({"patience": 2}, InvalidArgument, "^patience must be None without held_out"),
        ({"held_out": iter([])}, InvalidArgument, "^held_out must be iterable more than once"),
        ({"held_out": []}, DataError, "^batches must contain at least one batch"),
        (
            {"optimizer": "sgdd"},
            InvalidArgument,
            "^optimizer must be .*got 'sgdd'; did you mean 'sgd'",
        ),
        ({"momentum": 0.0}, InvalidArgument, "^optimizer: 'sgd' rejects .*Nesterov"),
        ({"schedule": "cos"}, InvalidArgument, "^schedule must be 'cosine', .*got 'cos'"),
        ({"autocast": torch.int8}, InvalidArgument, "^autocast must be torch.bfloat16"),
        ({"loss": "mse"}, InvalidArgument, "^loss must be 'cross-entropy'"),
        ({"progress": 1}, InvalidArgument, "^progress must be .*got 1"),
        ({"frozen": "convv.*"}, UnknownParameter, "^frozen: 'convv.*' matches no .*conv.bias"),
        (
            {"frozen": ["conv.*", "mix.*"]},
            InvalidArgument,
            "^frozen: no parameter is left to train",
        ),
    ],
)
def test_arguments_that_are_not_taken(given, error, message, data):
    model = net()
    before, flags_before = state(model), flags(model)
    with pytest.raises(error, match=message):
        finetune(model, data, **given)
    assert not changed(model, before)
    assert flags(model) == flags_before


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        ([], DataError, "^batches must contain at least one batch"),
        (iter([examples(1)]), InvalidArgument, "^batches must be iterable .*for 3 epochs"),
        ([(examples(1)[0], None)], DataError, "^labels must be given"),
        (
            [(examples(1)[0], examples(1)[1] + 1)],
            DataError,
            r"^labels must be in \[0, 3\] .*got 4 for sample 3",
        ),
        (
            [(examples(1)[0].to(torch.uint8), examples(1)[1])],
            DataError,
            "^images must be normalized",
        ),
    ],
)
def test_batches_that_are_not_taken(batches, error, message):
    model = net()
    before = state(model)
    with pytest.raises(error, match=message):
        finetune(model, batches)
    assert not changed(model, before)


def test_masks_that_are_not_taken(data):
    with pytest.raises(InvalidArgument, match="^masks must be fastsal.Masks, got dict"):
        fastsal.finetune(net(), data, dict(some_masks()), epochs=1, lr=0.1)
    with pytest.raises(MaskError, match="no parameter 'none'"):
        fastsal.finetune(net(), data, Masks({"none": torch.ones(1)}), epochs=1, lr=0.1)


def test_a_loss_that_is_not_finite(data):
    model = net()
    before, flags_before = state(model), flags(model)
    x, y = examples(3)
    x[5] = math.nan
    with pytest.raises(
        NonFiniteLoss, match="^epoch 1: the mean loss of samples 48 to 95 must be .*got nan"
    ):
        finetune(model, [examples(1), (x, y)])
    with pytest.raises(NonFiniteLoss, match="^epoch [123]: .*use a lower lr than 1e\\+"):
        finetune(model, data, lr=1e30, schedule="constant")
    assert not changed(model, before)
    assert flags(model) == flags_before


def test_weights_that_are_not_finite_after_the_last_batch():
    model = net()
    before = state(model)

    def loss(outputs, labels):
        return (outputs - outputs.detach()).sum(1).mul(math.inf).nan_to_num(0.0)

    with pytest.raises(NonFiniteLoss, match="^epoch 1: 'conv.weight' contains NaN or infinity"):
        finetune(model, [examples(1)], epochs=1, loss=loss)
    assert not changed(model, before)


@pytest.mark.parametrize("number", [np.float64, torch.tensor])
def test_numpy_and_torch_scalars_are_numbers(number, data):
    model, other = net(), net()
    whole = torch.tensor if number is torch.tensor else np.int64
    given = {"lr": number(0.125), "momentum": number(0.5), "weight_decay": number(0.25)}
    result = finetune(model, data, epochs=whole(2), seed=whole(3), **given)
    finetune(other, data, epochs=2, seed=3, lr=0.125, momentum=0.5, weight_decay=0.25)
    assert len(result.history) == 2
    assert not changed(model, state(other))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"epochs": True}, "epochs must be an integer, got True"),
        ({"epochs": 1.5}, "epochs must be an integer, got 1.5"),
        ({"patience": True, "held_out": []}, "patience must be an integer, got True"),
        ({"lr": True}, "lr must be a number, got True"),
        ({"lr": "0.1"}, "lr must be a number, got '0.1'"),
        ({"momentum": None}, "momentum must be a number, got None"),
        ({"seed": 0.5}, "seed must be an integer, got 0.5"),
    ],
)
def test_what_is_no_number_is_refused(given, message, data):
    with pytest.raises(InvalidArgument, match=f"^{message}"):
        finetune(net(), data, **given)
