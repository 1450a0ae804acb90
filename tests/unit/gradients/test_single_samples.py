"""No pass runs a single sample, whose gradients kernels of PyTorch may get wrong."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastsal
from fastsal.errors import InvalidArgument
from fastsal.gradients import GradientEngine, per_sample_gradients, select_parameters
from fastsal.pruning.recalibration import recalibrate

from .oracle import loop, randomize


class Levit(nn.Module):
    """A normalized map, then tokens with a residual connection: the memory formats of LeViT."""

    def __init__(self, width=8):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 1)
        self.mix = nn.Linear(width, width)
        self.norm = nn.BatchNorm2d(width)
        self.out = nn.Linear(width, 5)

    def forward(self, x):
        tokens = F.hardswish(self.norm(self.stem(x))).flatten(2).mT
        return self.out((tokens + torch.tanh(self.mix(tokens))).mean(1))


class Counting(Levit):
    """It knows the sizes of the batches that it is run on."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append(len(x))
        return super().forward(x)


class Standardized(nn.Linear):
    """A weight without a rule."""

    def forward(self, x):
        return F.linear(x, self.weight - self.weight.mean(), self.bias)


def net(kind=Levit, dtype=torch.float32):
    torch.manual_seed(0)
    return randomize(kind()).to(dtype).eval()


def data(n, dtype=torch.float32):
    torch.manual_seed(1)
    return torch.randn(n, 3, 4, 4, dtype=dtype), torch.arange(n) % 5


def expected(model, images, labels, names, **how):
    """In float64, each sample beside a copy of itself."""
    double = copy.deepcopy(model).double()
    pairs = [loop_of_two(double, images[i].double(), labels[i], names) for i in range(len(images))]
    return {name: torch.stack([pair[name] for pair in pairs]) for name in names}


def loop_of_two(model, image, label, names):
    parameters = dict(model.named_parameters())
    loss = F.cross_entropy(model(torch.stack([image, image])), torch.stack([label, label]))
    found = torch.autograd.grad(loss, [parameters[name] for name in names])
    return dict(zip(names, found, strict=True))


@pytest.mark.parametrize(("n", "micro_batch"), [(1, None), (1, 1), (3, 1), (3, 2), (5, 4)])
def test_gradients_of_single_images(n, micro_batch):
    model = net()
    images, labels = data(n)
    rows = per_sample_gradients(model, images, labels, micro_batch=micro_batch)
    wanted = expected(model, images, labels, list(rows))
    for name, row in rows.items():
        torch.testing.assert_close(row.double(), wanted[name], rtol=1e-3, atol=1e-6)


def test_gradients_without_a_rule_of_single_images():
    model = net()
    mix = model.mix
    model.mix = Standardized(8, 8)
    model.mix.load_state_dict(mix.state_dict())
    images, labels = data(3)
    for micro_batch in (1, 2):
        rows = per_sample_gradients(
            model, images, labels, parameters=["mix.weight", "stem.weight"], micro_batch=micro_batch
        )
        wanted = expected(model, images, labels, list(rows))
        for name, row in rows.items():
            torch.testing.assert_close(row.double(), wanted[name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("curvature", ["empirical", "sampled", "features"])
def test_no_pass_runs_a_single_image(curvature):
    model = net(Counting)
    batches = [data(3), data(2), data(2)]
    for micro_batch in (1, 2, None):
        fisher = fastsal.collect(model, batches, curvature=curvature, micro_batch=micro_batch)
        assert fisher.samples == 7
    assert min(model.seen) == 2
    fastsal.collect(model, [data(1)], curvature=curvature)
    assert min(model.seen) == 2


@pytest.mark.parametrize("curvature", ["sampled", "features"])
def test_random_draws_are_those_of_larger_batches(curvature):
    model = net(dtype=torch.float64)
    images, _ = data(5, torch.float64)
    one, all_ = (
        per_sample_gradients(
            model,
            images,
            None,
            curvature=curvature,
            micro_batch=m,
            seed=3,
            parameters="!out.weight",
        )
        for m in (1, 5)
    )
    torch.testing.assert_close(one, all_)


class Layouts(nn.Module):
    """Samples outermost, innermost, in windows, in token ids, and a layer that is called twice."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 6)
        self.last = nn.Linear(6, 6)
        self.rows = nn.Linear(6, 6)
        self.flat = nn.Linear(6, 6)
        self.windows = nn.Conv1d(6, 6, 2)
        self.out = nn.Linear(6, 5)

    def forward(self, tokens):
        x = self.table(tokens.T)  # [L, n, 6]
        x = torch.tanh(self.last(x))
        x = torch.tanh(self.flat(x.reshape(-1, 6)).reshape(x.shape))
        x = torch.tanh(self.rows(x.transpose(0, 1)))  # [n, L, 6]
        n = len(x)
        x = self.windows(x.reshape(n * 2, 2, 6).mT).reshape(n, 2, 6)
        return self.out(self.rows(x).mean(1))


def test_every_layout_of_samples():
    torch.manual_seed(0)
    model = randomize(Layouts()).double().eval()
    tokens, labels = torch.randint(0, 7, (3, 4)), torch.arange(3)
    names = [n for n, p in model.named_parameters() if p.dim() > 1]
    with GradientEngine(model, select_parameters(model, names), micro_batch=1) as engine:
        rows = {name: [] for name in names}
        engine.run(tokens, labels, lambda name, row: rows[name].append(row.clone()))
        assert not any("torch.func" in o for o in engine.operations.values()), engine.operations
    torch.testing.assert_close(
        {name: torch.cat(found) for name, found in rows.items()}, loop(model, tokens, labels, names)
    )


def test_fine_tuning_pads_a_single_image():
    masks = fastsal.Masks({"stem.weight": torch.ones(8, 3, 1, 1)})
    images, labels = data(1)
    tuned = {}
    for dtype in (torch.float32, torch.float64):
        model = net(Counting, dtype)
        fastsal.finetune(
            model, [(images.to(dtype), labels)], masks, epochs=1, lr=0.5, optimizer="momentum"
        )
        assert min(model.seen) == 2
        tuned[dtype] = model.stem.weight.detach().double()
    start = net(dtype=torch.float64)
    gradient = expected(start, images, labels, ["stem.weight"])["stem.weight"][0]
    torch.testing.assert_close(tuned[torch.float64], start.stem.weight.detach() - 0.5 * gradient)
    torch.testing.assert_close(tuned[torch.float32], tuned[torch.float64], rtol=1e-3, atol=1e-5)


class Classifier(nn.Sequential):
    """Batch normalization of one value per channel: PyTorch refuses a single image in training."""

    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(48, 6), nn.BatchNorm1d(6), nn.Linear(6, 5))


@pytest.mark.parametrize("sizes", [(4, 1), (4, 3, 1), (4, 1, 1), (3, 1, 2)])
def test_a_last_batch_of_one_is_joined_to_the_one_before(sizes):
    torch.manual_seed(0)
    model = Classifier()
    masks = fastsal.Masks({"1.weight": torch.ones(6, 48)})
    batches = [data(n) for n in sizes]
    done = fastsal.finetune(model, batches, masks, epochs=1, lr=0.01, train_normalization=True)
    assert done.history[0]["samples"] == sum(sizes)


def test_batches_of_one_are_refused_before_training():
    model = Classifier()
    masks = fastsal.Masks({"1.weight": torch.ones(6, 48)})
    steps = []
    batches = [data(1), data(1)]
    with pytest.raises(InvalidArgument, match=r"^batches must have at least two images"):
        fastsal.finetune(
            model, batches, masks, epochs=1, lr=0.01, train_normalization=True,
            progress=lambda *done: steps.append(done),
        )  # fmt: skip
    assert steps == []


@pytest.mark.parametrize("sizes", [(4, 1), (1, 1, 1), (1, 4), (2,)])
def test_recalibration_never_runs_a_single_image(sizes):
    torch.manual_seed(0)
    model = Classifier()
    batches = [data(n) for n in sizes]
    assert recalibrate(model, itertools.chain(batches)) == 1
    assert bool(torch.isfinite(model[2].running_var).all())
