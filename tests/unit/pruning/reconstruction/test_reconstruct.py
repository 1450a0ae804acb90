"""Each layer restores its dense outputs from the inputs that it has in the pruned model."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastsal
from fastsal.errors import DataError, InvalidArgument, MaskError
from fastsal.pruning.reconstruction.passes import reconstruct_on
from fastsal.pruning.shelf import copies, tensors_of

pytestmark = pytest.mark.usefixtures("one_thread")


class Block(nn.Module):
    """A residual block whose shortcut is computed after its layers."""

    def __init__(self, width):
        super().__init__()
        self.first = nn.Linear(width, 2 * width)
        self.second = nn.Linear(2 * width, width)
        self.gamma = nn.Parameter(torch.linspace(-1.0, 0.5, width))
        self.drop = nn.Dropout(0.1)

    def forward(self, x):
        inner = self.drop(self.second(torch.relu(self.first(x)))) * self.gamma
        return inner + x[:, : inner.shape[1]]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.block = Block(8)
        self.fc = nn.Linear(8, 3)

    def forward_features(self, x):
        return self.block(torch.tanh(self.stem(x)))

    def forward(self, x):
        return self.fc(self.forward_features(x))


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1, bias=False, groups=3)
        self.norm2 = nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 3)

    def forward_features(self, x):
        y = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(y)) + y).mean((2, 3))

    def forward(self, x):
        return self.fc(self.forward_features(x))


def seeded(kind):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = kind()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.running_mean)
                nn.init.uniform_(module.running_var, 0.5, 2)
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return model.eval()


def pruned(dense, sparsity=0.5, **select):
    model = copy.deepcopy(dense)
    masks = fastsal.rank(fastsal.score(model, None, "magnitude", **select), sparsity)
    masks.apply(model)
    return model, masks


def images(shape, n=64, seed=1, dtype=torch.float32):
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def solve(x, y, weight, kept, damping=0.1):
    """Least squares with a constant, row by row: weights and constants."""
    mean_x, mean_y = x.mean(0), y.mean(0)
    x, y = x - mean_x, y - mean_y
    moments = x.T @ x / len(x)
    found = weight.clone()
    for o in range(len(weight)):
        at = kept[o].nonzero()[:, 0]
        matrix = moments[at][:, at] + damping * moments.diagonal().mean() * torch.eye(len(at))
        lacks = (y[:, o] - x @ weight[o]) @ x[:, at] / len(x)
        found[o, at] += torch.linalg.solve(matrix, lacks)
    return found, mean_y - found @ mean_x


def test_layers_equal_plain_least_squares():
    """With the error of the shortcut in the target, divided by the factor on the output."""
    dense = seeded(Net).double()
    model, masks = pruned(dense)
    x = images((6,), dtype=torch.float64)
    kept = {name: mask.double() > 0 for name, mask in masks.items()}
    got = copy.deepcopy(model)
    solved, count = reconstruct_on(got, copies(tensors_of(dense)), masks, [(x, None)])
    assert (solved, count) == (
        ["stem.weight", "block.first.weight", "block.second.weight", "fc.weight"],
        64,
    )
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad():
            weight, bias = solve(x, dense.stem(x), model.stem.weight, kept["stem.weight"])
            torch.testing.assert_close(got.stem.weight, weight)
            torch.testing.assert_close(got.stem.bias, bias)
            before, after = torch.tanh(dense.stem(x)), torch.tanh(got.stem(x))
            block = dense.block
            weight, bias = solve(
                after, block.first(before), model.block.first.weight, kept["block.first.weight"]
            )
            torch.testing.assert_close(got.block.first.weight, weight)
            torch.testing.assert_close(got.block.first.bias, bias)
            wanted = block.second(torch.relu(block.first(before)))
            wanted = wanted + (before - after) / block.gamma
            weight, bias = solve(
                torch.relu(got.block.first(after)),
                wanted,
                model.block.second.weight,
                kept["block.second.weight"],
            )
            torch.testing.assert_close(got.block.second.weight, weight)
            torch.testing.assert_close(got.block.second.bias, bias)
    finally:
        torch.set_default_dtype(torch.float32)
    masks.verify(got)


def test_running_means_take_up_the_mean_error():
    dense = seeded(Convolutions).double()
    model, masks = pruned(dense, parameters="conv*")
    x = images((3, 7, 7), dtype=torch.float64)
    reconstruct_on(model, copies(tensors_of(dense)), masks, [(x, None)])
    with torch.no_grad():
        gap = model.norm1(model.conv1(x)) - dense.norm1(dense.conv1(x))
        before = torch.relu(dense.norm1(dense.conv1(x)))
        after = torch.relu(model.norm1(model.conv1(x)))
        # The second one makes up for the mean error of the shortcut, too.
        ends = model.norm2(model.conv2(after)) + after, dense.norm2(dense.conv2(before)) + before
    assert float(gap.mean((0, 2, 3)).abs().max()) < 1e-9
    assert float((ends[0] - ends[1]).mean((0, 2, 3)).abs().max()) < 1e-9
    assert torch.equal(model.norm1.running_var, dense.norm1.running_var)


def test_other_parameters_become_those_of_the_dense_model():
    dense = seeded(Convolutions)
    model, masks = pruned(dense, parameters="conv*")
    with torch.no_grad():
        model.norm1.weight.mul_(2)
        model.norm2.running_var.mul_(3)
        model.fc.weight.add_(1)
    reconstruct_on(model, copies(tensors_of(dense)), masks, [(images((3, 7, 7)), None)])
    for name in ("norm1.weight", "norm2.running_var", "fc.weight"):
        assert torch.equal(model.state_dict()[name], dense.state_dict()[name]), name


class Shared(nn.Module):
    """One layer twice, a weight that is computed, and an activation in place before the sum."""

    def __init__(self):
        super().__init__()
        self.twice = nn.Linear(6, 6)
        self.computed = nn.Linear(6, 6)
        self.once = nn.Linear(6, 6)
        self.fc = nn.Linear(6, 3)

    def forward_features(self, x):
        y = self.twice(torch.tanh(self.twice(x)))
        y = nn.functional.linear(y, self.computed.weight * 2)
        return torch.relu_(self.once(y)) + y

    def forward(self, x):
        return self.fc(self.forward_features(x))


def test_layers_without_one_call_are_left():
    dense = seeded(Shared)
    model, masks = pruned(dense)
    start = state(model)
    solved, _ = reconstruct_on(model, copies(tensors_of(dense)), masks, [(images((6,)), None)])
    assert solved == ["once.weight", "fc.weight"]
    for name in ("twice.weight", "computed.weight"):
        assert torch.equal(model.state_dict()[name], start[name])


def test_a_branch_ends_at_an_activation_in_place():
    """What is added to the sum then is not the output of the layer, so its target is its own."""
    dense = seeded(Shared).double()
    model, masks = pruned(dense, parameters="once.weight")
    x = images((6,), dtype=torch.float64)
    got = copy.deepcopy(model)
    reconstruct_on(got, copies(tensors_of(dense)), masks, [(x, None)])
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad():
            inner = dense.twice(torch.tanh(dense.twice(x))) @ (2 * dense.computed.weight).T
            weight, _ = solve(
                inner, dense.once(inner), model.once.weight, masks["once.weight"].double() > 0
            )
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(got.once.weight, weight)


def test_kept_only_if_held_out_features_are_closer():
    dense = seeded(Net)
    model, masks = pruned(dense, 0.6)
    batches = [(images((6,), 128, seed), None) for seed in range(4)]
    found = fastsal.reconstruct(model, dense, batches, masks)
    assert found.kept
    assert found.after < found.before
    assert (found.layers, found.images) == (4, 448)
    masks.verify(model)

    start = state(model)
    again = fastsal.reconstruct(model, dense, batches, masks)
    assert same(state(model), start) != again.kept

    untouched = copy.deepcopy(dense)
    every = fastsal.Masks({n: torch.ones_like(m) for n, m in masks.items()})
    nothing = fastsal.reconstruct(untouched, dense, batches, every)
    assert not nothing.kept
    assert same(state(untouched), state(dense))


def test_the_dense_model_and_all_modes_are_as_before():
    dense = seeded(Convolutions).train()
    model, masks = pruned(dense)
    model.conv2.eval()
    start, modes = state(dense), [m.training for m in model.modules()]
    fastsal.reconstruct(model, dense, [images((3, 7, 7), seed=s) for s in range(3)], masks)
    assert same(state(dense), start)
    assert [m.training for m in model.modules()] == modes
    assert dense.training
    assert all(p.grad is None for p in model.parameters())


def test_invalid_arguments_change_nothing():
    dense = seeded(Net)
    model, masks = pruned(dense)
    start = state(model)
    batches = [images((6,), seed=s) for s in range(2)]
    other = fastsal.Masks({"nothing.weight": torch.ones(3, 3, dtype=torch.bool)})
    for error, match, call in (
        (InvalidArgument, "dense must be another", lambda: {"dense": model}),
        (InvalidArgument, "dense must have the parameters", lambda: {"dense": seeded(Shared)}),
        (InvalidArgument, "iterable several times", lambda: {"batches": iter(batches)}),
        (InvalidArgument, "masks must be fastsal.Masks", lambda: {"masks": dict(masks)}),
        (InvalidArgument, "damping must be", lambda: {"damping": 0.0}),
        (InvalidArgument, "seed must be", lambda: {"seed": -1}),
        (MaskError, "nothing.weight", lambda: {"masks": other}),
        (DataError, "at least|must|image", lambda: {"batches": []}),
    ):
        given = {"model": model, "dense": dense, "batches": batches, "masks": masks} | call()
        with pytest.raises(error, match=match):
            fastsal.reconstruct(**given)
        assert same(state(model), start)


def test_an_error_during_the_pass_restores_the_model():
    dense = seeded(Net)
    model, masks = pruned(dense)
    start = state(model)
    calls = 0

    def fail(*_):
        nonlocal calls
        calls += 1
        if calls == 3:
            raise RuntimeError("stop")

    model.fc.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="stop"):
        fastsal.reconstruct(model, dense, [images((6,), seed=s) for s in range(2)], masks)
    assert same(state(model), start)


def test_prune_reconstructs_with_features_by_default():
    dense = seeded(Net)
    batches = [(images((6,), 64, seed), None) for seed in range(4)]
    model = copy.deepcopy(dense)
    result = fastsal.prune(model, batches, 0.6, rounds=2)
    effects = [entry.reconstruction for entry in result.history]
    assert all(effect is not None and effect.images == 224 for effect in effects)
    assert "reconstruction" in result.history[-1].as_dict()
    assert type(result.history[-1]).from_dict(result.history[-1].as_dict()) == result.history[-1]
    result.masks.verify(model)

    alone = copy.deepcopy(dense)
    without = fastsal.prune(alone, batches, 0.6, rounds=2, reconstruct=False)
    assert all(entry.reconstruction is None for entry in without.history)
    x = images((6,), seed=9)
    with torch.no_grad():
        errors = [
            float((m.forward_features(x) - dense.forward_features(x)).square().sum())
            for m in (model, alone)
        ]
    assert errors[0] < errors[1]


def test_prune_measures_the_dense_features_in_every_round():
    """Earlier rounds change biases, too; the targets of later ones are still the dense ones."""
    dense = seeded(Net)
    batches = [(images((6,), 64, seed), None) for seed in range(4)]
    model = copy.deepcopy(dense)
    result = fastsal.prune(model, batches, 0.7, rounds=3, recalibrate=False)
    effect = result.history[-1].reconstruction
    assert effect.kept
    held = torch.cat([x for x, _ in batches])
    with torch.no_grad():
        error = model.forward_features(held) - dense.forward_features(held)
        loss = float(error.square().mean() / 2)
    assert effect.after == pytest.approx(loss, rel=0.5)


def test_criteria_without_statistics_hold_images_out_for_it():
    dense = seeded(Net)
    batches = [(images((6,), 64, seed), None) for seed in range(4)]
    model = copy.deepcopy(dense)
    options = {"criterion": "magnitude", "compensate": False, "reconstruct": True}
    result = fastsal.prune(model, batches, 0.6, **options)
    effect = result.history[-1].reconstruction
    assert effect.kept
    assert effect.images == 224
    result.masks.verify(model)


def test_without_room_in_the_budget_the_default_leaves_it_out(monkeypatch):
    dense = seeded(Net)
    given = [(images((6,), 64, seed), None) for seed in range(4)], 0.6
    within = {"memory_budget": "1GiB"}
    found = fastsal.prune(copy.deepcopy(dense), *given, **within)
    assert found.history[0].reconstruction.images == 224
    monkeypatch.setattr("fastsal.pruning.stages.moment_bytes", lambda weights: 2**30)
    found = fastsal.prune(copy.deepcopy(dense), *given, **within)
    assert found.history[0].reconstruction is None
    with pytest.raises(InvalidArgument, match="memory_budget must be more than .* with rec"):
        fastsal.prune(copy.deepcopy(dense), *given, reconstruct=True, **within)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (
            {"batches": None, "criterion": "magnitude", "compensate": False},
            "images for reconstruct",
        ),
        ({"batches": iter([(torch.zeros(2, 6), None)])}, "reconstruct=True"),
        ({"max_loss_increase": 0.1, "sparsity": None}, "reconstruct"),
        ({"memory_budget": "1MiB"}, "memory_budget must be more than .* with reconstruct"),
    ],
)
def test_prune_refuses(given, match):
    model = seeded(Net)
    start = state(model)
    batches = [(images((6,)), torch.zeros(64, dtype=torch.int64))]
    given = {"batches": batches, "sparsity": 0.5, "reconstruct": True} | given
    with pytest.raises(InvalidArgument, match=match):
        fastsal.prune(model, **given)
    assert same(state(model), start)


def test_real_images(resnet20, shared_data):
    import numpy as np

    with np.load(shared_data / "cifar10_train.npz") as file:
        x = torch.from_numpy(file["x"][:512]).permute(0, 3, 1, 2).float() / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = (x - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    model, masks = pruned(resnet20, 0.8)
    found = fastsal.reconstruct(model, resnet20, list(x.split(128)), masks)
    assert found.kept
    assert found.layers == 20
    assert found.after < 0.7 * found.before
