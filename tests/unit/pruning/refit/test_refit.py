"""Refitting lowers the held-out error, holds the mask, and leaves the rest as it was."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from torch import nn

import fastsal
from fastsal import Refit
from fastsal.errors import DataError, InvalidArgument, MaskError

pytestmark = pytest.mark.usefixtures("one_thread")

FAST = Refit(steps=20, batch_size=16, lr=5e-3)


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        return x + self.conv2(torch.relu(self.norm(self.conv1(x))))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.Sequential(Block(8), Block(8))
        self.fc = nn.Linear(8, 4)

    def forward_features(self, x):
        return self.blocks(self.stem(x)).mean((2, 3))

    def forward(self, x):
        return self.fc(self.forward_features(x))


def pruned(names=("stem", "conv")):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dense = Net().eval()
    model = copy.deepcopy(dense)
    scores = {
        name: p.detach().abs()
        for name, p in model.named_parameters()
        if p.ndim > 1 and any(part in name for part in names)
    }
    masks = fastsal.rank(scores, 0.6)
    masks.apply(model)
    return model, dense, masks


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(16, 3, 8, 8, generator=generator), None) for _ in range(4)]


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(value.equal(b[name]) for name, value in a.items())


def test_the_held_out_error_falls_and_pruned_weights_remain_zero(data):
    model, dense, masks = pruned()
    before, modes = state(dense), [m.training for m in model.modules()]
    result = fastsal.refit(model, dense, data, masks, FAST)
    masks.verify(model)
    assert result.windows == ["blocks.0", "blocks.1"]
    assert result.after < 0.8 * result.before
    assert result.kept_step > 0
    assert same(state(dense), before)
    assert [m.training for m in model.modules()] == modes
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    # The head is no part of the features.
    assert same(model.fc.state_dict(), dense.fc.state_dict())


def test_the_errors_told_are_those_of_the_formula(data):
    model, dense, masks = pruned()
    start = copy.deepcopy(model)
    held = [torch.randn(8, 3, 8, 8)]
    result = fastsal.refit(model, dense, data, masks, FAST, held_out=held)

    def error(net):
        def outputs(m):
            first = m.blocks[0](m.stem(held[0]))
            second = m.blocks[1](first)
            return first, second, second.mean((2, 3))

        with torch.no_grad():
            pairs = zip(outputs(net.double().float()), outputs(dense), strict=True)
            (first, second, final) = pairs
            blocks = [float((a - b).square().sum() / b.square().sum()) for a, b in (first, second)]
            a, b = final
            of_features = float((a - b).square().sum() / (b - b.mean(0)).square().sum())
            return of_features / 2 + sum(blocks) / 4

    assert result.before == pytest.approx(error(start), rel=1e-5)
    assert result.after == pytest.approx(error(model), rel=1e-5)


def test_a_pruned_classifier_is_refitted_by_outputs(data):
    model, dense, masks = pruned(("fc",))
    result = fastsal.refit(model, dense, data, masks, Refit(windows="whole", steps=30, lr=1e-2))
    masks.verify(model)
    assert result.windows == []
    assert result.after < result.before


def test_the_seed_settles_everything_and_batches_nothing(data):
    results = []
    images = torch.cat([x for x, _ in data])
    for batches in (data, data, list(images.split(64))):
        model, dense, masks = pruned()
        fastsal.refit(model, dense, batches, masks, FAST, held_out=[images[:8]], seed=3)
        results.append(state(model))
    assert same(results[0], results[1])
    assert same(results[0], results[2])


def test_weights_are_kept_only_if_the_error_falls(data):
    model, dense, masks = pruned()
    before = state(model)
    how = Refit(steps=6, lr=1e3, batch_size=8, patience=2, checks=6)
    result = fastsal.refit(model, dense, data, masks, how)
    assert result.kept_step == 0
    assert result.steps == 2  # patience
    assert result.after == result.before
    assert same(state(model), before)


def test_the_default_reads_every_image_twice(data):
    model, dense, masks = pruned()
    images = torch.cat([x for x, _ in data])
    result = fastsal.refit(model, dense, data, masks, Refit(batch_size=16, patience=5))
    held = len(images) // 8
    assert result.steps == math.ceil(2 * (len(images) - held) / 16)
    assert result.after < result.before


def test_the_rate_is_a_multiple_of_the_best_step(data):
    """A step along the signs of the gradient, in parts of the weights of each tensor."""
    model, dense, masks = pruned()
    images = torch.cat([x for x, _ in data])
    how = Refit(batch_size=len(images), steps=1, augment=None)
    result = fastsal.refit(model, dense, data, masks, how, held_out=[images])
    start, _, _ = pruned()
    start, dense = start.double(), dense.double()

    def error():
        pairs = [
            (m.stem(images.double()), m.forward_features(images.double())) for m in (start, dense)
        ]
        outputs = [
            (m.blocks[0](first), m.blocks[1](m.blocks[0](first)), f)
            for (first, f), m in zip(pairs, (start, dense), strict=True)
        ]
        *blocks, (a, b) = zip(*outputs, strict=True)
        found = (a - b).square().sum() / (b - b.mean(0)).square().sum()
        return (found + sum((a - b).square().sum() / b.square().sum() for a, b in blocks) / 2) / 2

    error().backward()
    weights = {n: p.detach().clone() for n, p in start.named_parameters()}
    errors = {}
    for k in range(-14, 6):
        for n, p in start.named_parameters():
            if p.grad is not None:
                kept = weights[n][weights[n] != 0]
                size = max(float(kept.square().mean().sqrt()) if len(kept) else 0.0, 1e-3)
                held = masks[n] if n in dict(masks.items()) else torch.ones(())
                p.data = weights[n] - 1e-3 * 2.0**k * size * p.grad.sign() * held
        errors[1e-3 * 2.0**k] = float(error().detach())
    best = min(errors, key=errors.get)
    assert result.lr in (2 * best, 2 * best / 4)
    how = Refit(batch_size=len(images), steps=100, augment=None)
    model, dense, masks = pruned()
    longer = fastsal.refit(model, dense, data, masks, how, held_out=[images])
    assert longer.lr in [pytest.approx(5 * best / 4**falls) for falls in range(3)]


def test_the_rate_falls_until_the_error_does(data, monkeypatch):
    model, dense, masks = pruned()
    one = Refit(steps=1, batch_size=16)
    fast = 4**5 * fastsal.refit(copy.deepcopy(model), dense, data, masks, one).lr
    monkeypatch.setattr("fastsal.pruning.refit.fitting._MULTIPLE", 2.0 * 4**5)
    how = Refit(steps=60, batch_size=16, checks=12, patience=12)
    result = fastsal.refit(model, dense, data, masks, how)
    assert result.after < result.before
    worse = list(
        itertools.takewhile(lambda e: e["held_out_error"] >= result.before, result.history)
    )
    falls = [e for e in worse if e["held_out_error"] > 1.5 * result.before or e["step"] >= 30]
    assert len(falls) >= 1
    assert result.lr == fast / 4 ** len(falls)
    masks.verify(model)


def test_a_model_that_is_the_dense_one_remains_so(data):
    _, dense, _ = pruned()
    model = copy.deepcopy(dense)
    masks = fastsal.Masks({"stem.weight": torch.ones_like(model.stem.weight).bool()})
    result = fastsal.refit(model, dense, data, masks, Refit(batch_size=16))
    assert (result.before, result.after, result.kept_step) == (0, 0, 0)
    assert same(state(model), state(dense))


class Steep(nn.Module):
    """Its outputs overflow float32 unless steps are below a millionth of the weights."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4, bias=False)

    def forward(self, x):
        y = self.fc(x)
        return y + torch.exp(1e8 * (self.fc.weight - self.start).abs().sum() - 60)


def test_the_best_step_is_found_where_larger_ones_overflow():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dense = Steep()
    dense.register_buffer("start", dense.fc.weight.detach().clone())
    model = copy.deepcopy(dense)
    masks = fastsal.rank({"fc.weight": model.fc.weight.detach().abs()}, 0.25)
    masks.apply(model)
    model.start.copy_(model.fc.weight.detach())
    data = [(torch.randn(32, 4, generator=torch.Generator().manual_seed(1)), None)]
    how = Refit(steps=4, batch_size=8, windows="whole")
    result = fastsal.refit(model, dense, data, masks, how)
    assert result.lr < 1e-6
    masks.verify(model)


def test_rates_are_relative_to_the_kept_weights(data, monkeypatch):
    """The first step of Adam moves each weight by its learning rate."""
    monkeypatch.setattr("fastsal.pruning.refit.fitting._MULTIPLE", 1.0)
    model, dense, masks = pruned()
    before, images = state(model), torch.cat([x for x, _ in data])
    how = Refit(steps=1, batch_size=len(images), augment=None)
    result = fastsal.refit(model, dense, data, masks, how, held_out=[images])
    for name, parameter in model.named_parameters():
        moved = (parameter.detach() - before[name]).abs()
        kept = before[name][before[name] != 0]
        rate = result.lr * max(float(kept.square().mean().sqrt()) if len(kept) else 0.0, 1e-3)
        if name.startswith("fc"):  # features do not depend on it
            rate = 0.0
        assert float(moved.max()) == pytest.approx(rate, rel=1e-2), name


def test_frozen_parameters_and_gradients_return(data):
    model, dense, masks = pruned()
    model.stem.weight.requires_grad_(False)
    model.fc.bias.grad = torch.ones(4)
    fastsal.refit(model, dense, data, masks, FAST)
    assert not model.stem.weight.requires_grad
    assert model.fc.bias.grad.tolist() == [1, 1, 1, 1]
    masks.verify(model)


class Failing:
    """Fails in the second pass over it."""

    def __init__(self, batches, error):
        self._batches, self._error, self._passes = batches, error, 0

    def __iter__(self):
        self._passes += 1
        yield self._batches[0]
        if self._passes > 1:
            raise self._error
        yield from self._batches[1:]


@pytest.mark.parametrize("error", [OSError("disk"), KeyboardInterrupt()])
def test_after_an_error_the_model_is_as_it_was(data, error):
    model, dense, masks = pruned()
    model.train()
    before = state(model)
    with pytest.raises(type(error)):
        fastsal.refit(model, dense, Failing(data, error), masks, FAST)
    assert same(state(model), before)
    assert all(m.training for m in model.modules())
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Refit(steps=0), "steps must be"),
        (Refit(steps="many"), "steps must be a whole number or 'auto', got 'many'"),
        (Refit(lr=-1), "lr must be"),
        (Refit(lr="best"), "lr must be a positive number or 'auto', got 'best'"),
        (Refit(batch_size=0.5), "batch_size must be"),
        (Refit(augment="blur"), "augment must be"),
        ("block", "windows must be"),
        (["blocks.9"], "windows must be names of modules, got 'blocks.9'"),
    ],
)
def test_invalid_settings(data, settings, message):
    model, dense, masks = pruned()
    with pytest.raises(InvalidArgument, match=message):
        fastsal.refit(model, dense, data, masks, settings)


def test_invalid_arguments(data):
    model, dense, masks = pruned()
    with pytest.raises(InvalidArgument, match="dense must be another module"):
        fastsal.refit(model, model, data, masks)
    with pytest.raises(InvalidArgument, match="dense must have the parameters of model"):
        fastsal.refit(model, dense.blocks, data, masks)
    with pytest.raises(InvalidArgument, match="batches must be iterable several times"):
        fastsal.refit(model, dense, iter(data), masks)
    with pytest.raises(InvalidArgument, match="masks must be fastsal.Masks, got dict"):
        fastsal.refit(model, dense, data, dict(masks.items()))
    with pytest.raises(MaskError):
        fastsal.refit(model, dense, data, fastsal.Masks({"x": torch.ones(2).bool()}))
    with pytest.raises(DataError):
        fastsal.refit(model, dense, [], masks)


class Narrow(Net):
    """Widths as another library leaves them: fewer units in the blocks, or everywhere."""

    def __init__(self, inner=8, outer=8):
        super().__init__()
        if outer < 8:
            self.stem = nn.Conv2d(3, outer, 3, padding=1)
            self.blocks = nn.Sequential(Block(outer), Block(outer))
            self.fc = nn.Linear(outer, 4)
        for block in self.blocks:
            block.conv1 = nn.Conv2d(outer, inner, 3, padding=1)
            block.norm = nn.BatchNorm2d(inner)
            block.conv2 = nn.Conv2d(inner, outer, 3, padding=1)


@pytest.mark.parametrize(("inner", "outer", "windows"), [(5, 8, 2), (5, 6, 0)])
def test_model_that_another_library_made_narrower(data, inner, outer, windows):
    dense = pruned()[1]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = Narrow(inner, outer).eval()
    masks = fastsal.Masks({"stem.weight": torch.ones_like(model.stem.weight).bool()})
    result = fastsal.refit(model, dense, data, masks, FAST)
    assert result.after < 0.9 * result.before
    assert len(result.windows) == windows
    x = torch.cat([images for images, _ in data])
    if outer < 8:  # features differ in width, so logits are matched
        with torch.no_grad():
            a, b = model(x), dense(x)
        assert float((a - b).square().sum() / (b - b.mean(0)).square().sum()) < result.before


def test_dense_model_with_smaller_parameters_or_other_outputs(data):
    dense = pruned()[1]
    narrow, other = Narrow(5).eval(), Narrow(5).eval()
    other.fc = nn.Linear(8, 3)
    masks = fastsal.Masks({"stem.weight": torch.ones_like(dense.stem.weight).bool()})
    expected = r"the parameters of model, in the same or in larger sizes, got another 'blocks"
    with pytest.raises(InvalidArgument, match=expected):
        fastsal.refit(dense, narrow, data, masks, FAST)
    head = fastsal.Masks({"fc.weight": torch.ones_like(other.fc.weight).bool()})
    with pytest.raises(InvalidArgument, match=r"the shape of model's, \(3,\), got \(4,\)"):
        fastsal.refit(other, dense, data, head, FAST)


def test_settings_take_numbers_of_numpy():
    import numpy as np

    how = Refit(steps=np.int64(3), lr=np.float32(0.5)).checked()
    assert (how.steps, how.lr) == (3, 0.5)
    assert type(how.steps) is int


def test_real_model(resnet20, cifar10):
    x, _ = cifar10("train", 192)
    model, dense = copy.deepcopy(resnet20), copy.deepcopy(resnet20)
    batches = list(x.split(96))
    result = fastsal.prune(model, batches, 0.9, curvature="features", damping=1e-5)
    found = fastsal.refit(
        model, dense, batches, result.masks, Refit(steps=6, batch_size=48, lr=2e-3)
    )
    result.masks.verify(model)
    assert len(found.windows) == 9
    assert found.after < 0.95 * found.before
