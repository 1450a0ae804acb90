"""Statistics from a model and images = a loop over samples with autograd."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fastsal import collect
from fastsal.data.batches import as_batches
from fastsal.errors import (
    DataError,
    InvalidArgument,
    NonFiniteGradient,
    UnknownParameter,
    UnsupportedLayer,
)
from fastsal.fisher.block_fisher import sums_of

CLASSES = 4


pytestmark = pytest.mark.usefixtures("one_thread")


def net(dtype=torch.float64):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU(), nn.Dropout(0.5),
        nn.Conv2d(5, 6, 3, stride=2, groups=1), nn.ReLU(), nn.Flatten(), nn.Linear(24, CLASSES),
    )  # fmt: skip
    model[1].running_mean.uniform_(-0.3, 0.3)
    return model.to(dtype).train()


WEIGHTS = ["0.weight", "4.weight", "7.weight"]


def data(n, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(n, 2, 6, 6, generator=generator, dtype=torch.float64).to(dtype)
    return images, torch.randint(CLASSES, (n,), generator=generator)


def rows(model, images, labels, names=WEIGHTS, loss=None):
    """One sample, one `autograd.grad`, in evaluation mode."""
    model = copy.deepcopy(model).eval()
    owned = dict(model.named_parameters())
    result = {name: [] for name in names}
    for x, y in zip(images, labels, strict=True):
        outputs = model(x[None])
        value = (
            F.cross_entropy(outputs, y[None]) if loss is None else loss(outputs, y[None])
        ).sum()
        for name, g in zip(
            names, torch.autograd.grad(value, [owned[n] for n in names]), strict=True
        ):
            result[name].append(g)
    return {name: torch.stack(values) for name, values in result.items()}


def assert_statistics(fisher, gradients, rtol=1e-9):
    assert fisher.names == list(gradients)
    for name, g in gradients.items():
        assert fisher.samples == len(g)
        assert fisher.shapes[name] == tuple(g.shape[1:])
        flat = g.double().reshape(len(g), -1)
        size = fisher.block_size or flat.shape[1]
        for b, block in enumerate(fisher.blocks(name)):
            part = flat[:, b * size : (b + 1) * size]
            n = part.shape[1]
            want = part.T @ part / len(part)
            torch.testing.assert_close(block[:n, :n], want, rtol=rtol, atol=rtol * want.abs().max())
        mean = fisher.mean_gradient()[name]
        torch.testing.assert_close(mean, g.double().mean(0), rtol=rtol, atol=rtol * g.abs().max())


@pytest.mark.parametrize("block_size", [1, 16, None])
@pytest.mark.parametrize("micro_batch", [None, 1, 3, 64])
@pytest.mark.parametrize("n", [1, 5, 40])
def test_equals_the_loop(n, micro_batch, block_size):
    model, (images, labels) = net(), data(n)
    fisher = collect(
        model,
        [(images, labels)],
        micro_batch=micro_batch,
        block_size=block_size,
        precision="float64",
    )
    assert_statistics(fisher, rows(model, images, labels))


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=5),
    st.one_of(st.none(), st.integers(1, 10)),
    st.sampled_from([4, None]),
)
def test_any_batches_are_the_same(counts, micro_batch, block_size):
    model, (images, labels) = net(), data(sum(counts))
    batches = zip(images.split(counts), labels.split(counts), strict=True)
    fisher = collect(
        model, batches, micro_batch=micro_batch, block_size=block_size, precision="float64"
    )
    assert_statistics(fisher, rows(model, images, labels))


@pytest.mark.parametrize("block_size", [8, None])
def test_single_precision(block_size):
    model, (images, labels) = net(torch.float32), data(50)
    fisher = collect(model, [(images.float(), labels)], block_size=block_size)
    exact = rows(net(), images, labels)
    assert_statistics(fisher, exact, rtol=1e-4)


def test_sixteen_bit_model():
    model, (images, labels) = net(torch.bfloat16), data(20)
    fisher = collect(model, [(images, labels)])
    want = rows(net(), images, labels)["7.weight"].square().mean(0)
    assert (fisher.diagonal()["7.weight"] - want).norm() < 0.1 * want.norm()


def test_autocast_is_close():
    model, (images, labels) = net(torch.float32), data(40)
    batches = [(images.float(), labels)]
    cast, plain = collect(model, batches, autocast=torch.bfloat16), collect(model, batches)
    for name in WEIGHTS:
        a, b = cast.diagonal()[name], plain.diagonal()[name]
        assert 0 < (a - b).norm() < 0.05 * b.norm()
    assert model[0].weight.dtype == torch.float32


@pytest.mark.parametrize("samples", [1, 7, 8, 9, 20])
def test_samples_are_exact(samples):
    model, (images, labels) = net(), data(20)
    taken = []

    def batches():
        for start in range(0, 20, 8):
            taken.append(start)
            yield images[start : start + 8], labels[start : start + 8]

    for micro_batch in (None, 3):
        taken.clear()
        fisher = collect(
            model, batches(), samples=samples, micro_batch=micro_batch, precision="float64"
        )
        assert_statistics(fisher, rows(model, images[:samples], labels[:samples]))
        assert taken == list(range(0, samples, 8)), "no batch more than needed is drawn"


def test_samples_of_the_dual_form():
    model, (images, labels) = net(), data(20)
    fisher = collect(model, [(images, labels)], samples=6, block_size=None, precision="float64")
    assert sums_of(fisher).parameters["4.weight"].packed is None
    assert_statistics(fisher, rows(model, images[:6], labels[:6]))


def test_iterators_and_other_pairs():
    model, (images, labels) = net(), data(12)
    want = rows(model, images, labels)
    for batches in (
        iter([(images, labels)]),
        [[images, labels]],
        [(images, labels.tolist())],
        [(images, labels.numpy())],
        [(images, labels.to(torch.int64))],
        torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=5),
    ):
        assert_statistics(collect(model, batches, precision="float64"), want)


def test_parameters_and_loss():
    model, (images, labels) = net(), data(12)

    def loss(outputs, targets):
        return (outputs - F.one_hot(targets, CLASSES)).square().sum(1)

    names = ["0.bias", "1.weight", "7.weight"]
    fisher = collect(model, [(images, labels)], parameters=names, loss=loss, precision="float64")
    assert_statistics(fisher, rows(model, images, labels, names, loss))


def test_targets_that_are_not_labels():
    model, (images, _) = net(), data(12)
    targets = torch.randn(12, CLASSES, dtype=torch.float64)

    def loss(outputs, targets):
        return (outputs - targets).square().sum(1)

    fisher = collect(model, [(images, targets)], loss=loss, micro_batch=5, precision="float64")
    assert_statistics(fisher, rows(model, images, targets, loss=loss))


# Labels drawn from the model.


def test_sampled_labels_are_reproducible():
    model, (images, labels) = net(), data(40)

    def diagonal(batches, **arguments):
        fisher = collect(model, batches, curvature="sampled", precision="float64", **arguments)
        return fisher.diagonal()["7.weight"]

    first = diagonal([(images, labels)], seed=3)
    torch.manual_seed(99)
    torch.testing.assert_close(diagonal([(images, labels)], seed=3), first, rtol=1e-12, atol=0)
    # Neither labels, nor batches, nor the size of passes matter.
    for batches in ([(images, None)], [images], [(images, -labels)], list(images.split(7))):
        for micro_batch in (None, 1, 3):
            again = diagonal(batches, seed=3, micro_batch=micro_batch)
            torch.testing.assert_close(again, first, rtol=1e-9, atol=0)
    assert not torch.allclose(diagonal([images], seed=4), first, rtol=1e-3)
    assert not torch.allclose(
        collect(model, [(images, labels)]).diagonal()["7.weight"], first, rtol=1e-3
    )


def test_sampled_labels_tend_to_the_true_fisher():
    """The mean over labels drawn from the softmax, of squared gradients."""
    model, (images, _) = net(), data(4)
    with torch.no_grad():
        p = copy.deepcopy(model).eval()(images).softmax(1)
    want = 0
    for c in range(CLASSES):
        g = rows(model, images, torch.full((4,), c))["7.weight"]
        want = want + (p[:, c, None, None] * g.square()).mean(0)
    repeated = images.repeat(2000, 1, 1, 1)
    got = collect(model, [repeated], curvature="sampled").diagonal()["7.weight"]
    assert (got - want).norm() < 0.05 * want.norm()


# What is refused.


def nan_at(images, at, value=math.nan):
    images = images.clone()
    images[at, 0, 2, 2] = value
    return images


@pytest.mark.parametrize("micro_batch", [None, 1, 2, 5])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(("batch", "at"), [(0, 0), (0, 5), (2, 5), (2, 0)])
def test_images_that_are_not_finite(batch, at, value, micro_batch):
    images, labels = data(8)
    batches = [(images, labels)] * 3
    batches[batch] = (nan_at(images, at, value), labels)
    with pytest.raises(
        NonFiniteGradient, match=f"^sample {8 * batch + at}: the loss must be finite"
    ):
        collect(net(), batches, micro_batch=micro_batch)


@pytest.mark.parametrize("block_size", [4, None])
def test_gradients_that_are_not_finite_name_the_parameter(block_size):
    """The loss is finite, its gradient at zero is not."""

    def loss(outputs, labels):
        return outputs.sum(1).abs().sqrt()

    model = nn.Sequential(nn.Flatten(), nn.Linear(72, 3, bias=False))
    images, labels = data(8, dtype=torch.float32)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1.0)
    images[6] = 0
    with pytest.raises(
        NonFiniteGradient, match=r"gradients must be finite, got nan for '1.weight', sample 14, at"
    ):
        collect(
            model,
            [(images[:4].abs() + 1, labels[:4]), (images[:4].abs() + 1, labels[:4]),
             (images, labels)],
            loss=loss,
            block_size=block_size,
            micro_batch=3,
        )  # fmt: skip


@pytest.mark.parametrize("micro_batch", [None, 2])
@pytest.mark.parametrize("wrong", [CLASSES, 1000, -1, -100])
@pytest.mark.parametrize(("batch", "at"), [(0, 0), (1, 5)])
def test_labels_out_of_range(batch, at, wrong, micro_batch):
    images, labels = data(8)
    batches = [(images, labels), (images, labels)]
    bad = labels.clone()
    bad[at] = wrong
    batches[batch] = (images, bad)
    with pytest.raises(
        DataError, match=f"^labels must be .*got {wrong} for sample {8 * batch + at}$"
    ):
        collect(net(), batches, micro_batch=micro_batch)


def bad_batches():
    images, labels = data(8)
    return {
        "empty": ([], "batches must contain at least one batch"),
        "empty iterator": (iter(()), "batches must contain at least one batch"),
        "empty batch": ([(images[:0], labels[:0])], "batches: batch 0 must have a tensor"),
        "empty batch later": ([(images, labels), (images[:0], labels[:0])], "batches: batch 1"),
        "images alone": ([images], "batches: batch 0 must be a pair .*a tensor"),
        "triples": ([(images, labels, labels)], "batches: batch 0 must be a pair .*of length 3"),
        "dicts": ([{"a": images, "y": labels}], "batches: batch 0 must have one entry of images"),
        "text": (["ab"], "batches: batch 0 must be a pair .*str"),
        "none": ([None], "batches: batch 0 must be a pair .*NoneType"),
        "arrays": ([(images.numpy(), labels)], "batches: batch 0 must have a tensor"),
        "integers": ([((images * 10).long(), labels)], "images must be normalized"),
        "no labels": ([(images, None)], "labels must be given, except with curvature='sampled'"),
        "one label": ([(images, 3)], "labels: batch 0 must have one label per image"),
        "fewer labels": ([(images, labels), (images, labels[:7])], "labels: batch 1 must have one"),
        "more labels": ([(images[:5], labels)], r"labels: batch 0 .*\[8\] for 5 images"),
        "names": ([(images, ["cat"] * 8)], "labels: batch 0 must have a tensor"),
        "floating labels": ([(images, labels.double())], "labels must be integers"),
        "one-hot labels": ([(images, F.one_hot(labels))], "labels must be class indices"),
    }  # fmt: skip


@pytest.mark.parametrize("micro_batch", [None, 3])
@pytest.mark.parametrize("case", bad_batches())
def test_batches_that_are_not_taken(case, micro_batch):
    batches, message = bad_batches()[case]
    model = net()
    before = everything(model)
    with pytest.raises(DataError, match=f"^{message}"):
        collect(model, batches, micro_batch=micro_batch)
    assert_untouched(model, before)


def test_fewer_samples_than_asked_for():
    images, labels = data(8)
    with pytest.raises(DataError, match="^samples must be at most 16, .*got 20"):
        collect(net(), [(images, labels)] * 2, samples=20)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"samples": 0}, InvalidArgument, "samples must be at least 1, got 0"),
        ({"samples": -1}, InvalidArgument, "samples must be at least 1, got -1"),
        ({"block_size": 0}, InvalidArgument, "block_size must be at least 1, got 0"),
        ({"precision": "half"}, InvalidArgument, "precision must be .*, got 'half'"),
        ({"micro_batch": 0}, InvalidArgument, "micro_batch must be at least 1, got 0"),
        ({"curvature": "drawn"}, InvalidArgument, "curvature must be .*'drawn'"),
        ({"loss": "hinge"}, InvalidArgument, "loss must be .*'hinge'"),
        ({"autocast": torch.float64}, InvalidArgument, "autocast must be"),
        ({"memory_budget": 1000}, InvalidArgument, "memory_budget must be at least .*, got 1 KiB"),
        ({"parameters": "none"}, UnknownParameter, "parameters: 'none' matches no parameter"),
        ({"parameters": ["7.weight", "8.*"]}, UnknownParameter, "parameters: '8.*' matches"),
        ({"parameters": "7.wieght"}, UnknownParameter, "did you mean '7.weight'"),
        ({"loss": lambda outputs, labels: outputs.mean()}, InvalidArgument, "loss must return"),
    ],
)
def test_arguments_that_are_not_taken(arguments, error, message):
    model = net()
    before = everything(model)
    with pytest.raises(error, match=message):
        collect(model, [data(8)], **arguments)
    assert_untouched(model, before)


def test_a_parameter_that_receives_no_gradient():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(72, CLASSES), nn.Linear(3, 3)

        def forward(self, x):
            return self.used(x.flatten(1))

    model, batch = Idle().double(), data(6)
    with pytest.raises(UnsupportedLayer, match=r"no gradient reaches idle.weight.*'!name'"):
        collect(model, [batch])
    assert collect(model, [batch], parameters="!idle.*").names == ["used.weight"]


# The model is left as it was found.


def everything(model):
    return {
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "training": [m.training for m in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "grad": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "hooks": [(len(m._forward_hooks), len(m._backward_hooks)) for m in model.modules()],
        "rng": torch.get_rng_state(),
        "grad mode": torch.is_grad_enabled(),
    }


def assert_untouched(model, before):
    after = everything(model)
    for key in ("training", "requires_grad", "hooks", "grad mode"):
        assert after[key] == before[key], key
    assert torch.equal(after["rng"], before["rng"])
    for name, value in before["state"].items():
        assert torch.equal(after["state"][name], value), name
    for a, b in zip(after["grad"], before["grad"], strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


def peculiar():
    model = net()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    model[7].bias.requires_grad_(False)
    model[4].weight.grad = torch.randn_like(model[4].weight)
    return model


@pytest.mark.parametrize("curvature", ["empirical", "sampled"])
def test_the_model_is_left_as_it_was(curvature):
    model = peculiar()
    before = everything(model)
    collect(model, [data(9), data(3)], curvature=curvature, micro_batch=2)
    assert_untouched(model, before)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inside_other_modes(mode):
    model, (images, labels) = peculiar(), data(9)
    want = rows(net(), images, labels)
    before = everything(model)
    with mode():
        fisher = collect(model, [(images, labels)], precision="float64")
    assert_untouched(model, before)
    assert_statistics(fisher, want)


class Interrupted(Exception):
    pass


def failing():
    images, labels = data(8)

    def stops():
        yield images, labels
        raise Interrupted

    def progress(done, total):
        raise Interrupted

    def loss(outputs, labels):
        if len(outputs) == 3:
            raise Interrupted
        return outputs.sum(1)

    return {
        "iterable": ({"batches": stops()}, Interrupted),
        "progress": ({"progress": progress}, Interrupted),
        "loss": ({"loss": loss, "micro_batch": 3}, Interrupted),
        "images": ({"batches": [(images, labels), (nan_at(images, 4), labels)]}, NonFiniteGradient),
        "labels": ({"batches": [(images, labels), (images, labels + 9)]}, DataError),
        "samples": ({"samples": 99}, DataError),
        "shape": ({"batches": [(images, labels), (images[:, :1], labels)]}, Exception),
    }  # fmt: skip


@pytest.mark.parametrize("case", failing())
def test_the_model_is_left_as_it_was_after_errors(case):
    arguments, error = failing()[case]
    model = peculiar()
    before = everything(model)
    with pytest.raises(error):
        collect(model, **{"batches": [data(8)], **arguments})
    assert_untouched(model, before)
    assert collect(model, [data(8)]).samples == 8


def test_progress_counts_samples():
    seen = []
    collect(net(), [data(5), data(4)], micro_batch=3, progress=lambda *a: seen.append(a))
    assert [done for done, _ in seen] == [3, 6, 9]
    assert {total for _, total in seen} == {None}
    seen.clear()
    collect(net(), [data(5), data(4)], samples=7, progress=lambda *a: seen.append(a))
    assert seen[-1] == (7, 7)


# Iterating.


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=6), st.integers(1, 30))
def test_as_batches_stops_exactly(counts, samples):
    images, labels = torch.arange(sum(counts)), torch.arange(sum(counts)) * 10
    batches = zip(images.split(counts), labels.split(counts), strict=True)
    out = as_batches(batches, samples)
    if samples > sum(counts):
        with pytest.raises(DataError, match="^samples must be at most"):
            list(out)
        return
    pairs = list(out)
    assert torch.equal(torch.cat([x for x, _ in pairs]), images[:samples])
    assert torch.equal(torch.cat([y for _, y in pairs]), labels[:samples])
    assert all(len(x) == len(y) >= 1 for x, y in pairs)
