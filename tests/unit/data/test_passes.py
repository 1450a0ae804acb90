"""Later passes over images are those of the first one; a first part in class order is told of."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import fastsal
from fastsal.data.batches import Source
from fastsal.data.class_order import in_class_order, largest_size, size_of
from fastsal.data.image_set import ImageSet
from fastsal.data.stream_digest import StreamDigest, sample_digests
from fastsal.errors import DataError
from fastsal.models.inputs import InputSpec

from ..small_net import net

# Several passes; and, without a scratch folder, passes again for each use.
BUDGET = {"memory_budget": "92MiB", "micro_batch": 4}
AGAIN = {"memory_budget": "102MiB", "micro_batch": 4}


def data(n=48, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, 8, 8, generator=generator)
    return x, torch.randint(0, 10, (n,), generator=generator)


class Reordered:
    """The same samples in another order on every pass, as a loader with shuffle=True yields."""

    def __init__(self, change, n=48):
        self.x, self.y = data(n)
        self.change, self.passes = change, 0

    def __iter__(self):
        self.passes += 1
        generator = torch.Generator().manual_seed(self.passes)
        x, y = self.change(self.x, self.y, generator)
        return iter(list(zip(x.split(8), y.split(8), strict=True)))


def shuffled(x, y, generator):
    order = torch.randperm(len(x), generator=generator)
    return x[order], y[order]


def flipped(x, y, generator):
    chosen = torch.rand(len(x), generator=generator) < 0.5
    return torch.where(chosen[:, None, None, None], x.flip(3), x), y


def relabeled(x, y, generator):
    return x, torch.randint(0, 10, y.shape, generator=generator)


SAME = "batches must yield the same images on every pass .*got others .*shuffle=False"


@pytest.mark.parametrize("change", [shuffled, flipped, relabeled])
def test_other_images_on_a_later_pass_are_refused(change, tmp_path):
    """Only their number was compared, so that each group was summed over other images."""
    with pytest.raises(DataError, match=SAME):
        fastsal.collect(net(), Reordered(change), scratch=tmp_path, **BUDGET)
    model = net()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    for damping in (1e-3, "auto"):
        with pytest.raises(DataError, match=SAME):
            fastsal.prune(model, Reordered(change), 0.5, damping=damping, **AGAIN)
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())


def test_a_shuffling_loader_is_refused_only_where_there_are_several_passes(tmp_path):
    def loader():
        return DataLoader(TensorDataset(*data()), batch_size=8, shuffle=True)

    with pytest.raises(DataError, match=SAME):
        fastsal.collect(net(), loader(), scratch=tmp_path, **BUDGET)
    for how in ({}, {"memory_budget": "4GiB"}):
        assert fastsal.collect(net(), loader(), **how).samples == 48
        fastsal.prune(net(), loader(), 0.5, rounds=2, damping=1e-3, **how)


def test_images_of_a_set_are_picked(tmp_path):
    """The same result as from batches in memory, without reading the other images again."""
    rng = np.random.default_rng(0)
    images = ImageSet(rng.integers(0, 255, (64, 8, 8, 3)).astype(np.uint8), np.arange(64) % 10)
    batches = images.batches(InputSpec(3, None, (0.5,) * 3, (0.5,) * 3), 16, shuffle_seed=0)
    budget = {"memory_budget": "98MiB", "scratch": tmp_path}
    for how in ({"sparsity": 0.5}, {"max_loss_increase": 2.0, "confidence": 0.1}):
        models = [net(), net(), net()]
        results = [
            fastsal.prune(model, given, micro_batch=4, **how, **more)
            for model, given, more in zip(
                models, (batches, list(batches), batches), ({}, budget, budget), strict=True
            )
        ]
        assert results[0].masks == results[1].masks == results[2].masks
        evidence = [result.history[0].damping_evidence for result in results]
        assert evidence[0] == evidence[1] == evidence[2]


def test_held_out_images_that_change_are_refused():
    how = {"criterion": "magnitude", "compensate": False, "max_loss_increase": 1.0}
    x, y = data()
    steady = [(x, y)]
    message = "held_out must yield the same images on every pass .*got others"
    for damping in ({"damping": 1e-3}, how):
        given = {"max_loss_increase": 1.0, **damping, "memory_budget": "1GiB"}
        with pytest.raises(DataError, match=message):
            fastsal.prune(net(), steady, held_out=Reordered(shuffled), **given)
    # Kept in memory, they come once.
    fastsal.prune(net(), steady, held_out=Reordered(shuffled), **how)


def test_recalibration_does_not_see_held_out_images(monkeypatch):
    """By a loader that shuffles, it averaged over those that it was then measured on."""
    from fastsal.pruning import rounds

    seen = []

    def watched(model, source, loss):
        seen.extend(row.numpy().tobytes() for images, _ in source for row in images)
        return rounds_recalibrate(model, iter(()), loss)

    rounds_recalibrate = rounds.recalibrate_if_better
    monkeypatch.setattr(rounds, "recalibrate_if_better", watched)
    held = []
    real = rounds.require_some

    def remember(samples):
        held.extend(row.numpy().tobytes() for images, _ in samples for row in images)
        real(samples)

    monkeypatch.setattr(rounds, "require_some", remember)
    fastsal.prune(net(), Reordered(shuffled), 0.5, damping=1e-3, recalibrate=True)
    assert len(held) == 6
    assert len(seen) >= 30
    assert not set(seen) & set(held)


def test_the_digest_is_of_samples_in_their_order():
    x, y = data(40)

    def value(images, labels, size):
        digest = StreamDigest()
        for some in range(0, len(images), size):
            digest.add(images[some : some + size], labels[some : some + size])
        assert digest.samples == len(images)
        return digest.value()

    want = value(x, y, 40)
    assert value(x, y, 7) == value(x.clone(), y.to(torch.int64), 1) == want
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    others = [
        (x[order], y[order]), (x, y.roll(1)), (x.flip(3), y), (x.roll(1, 2), y), (x + 1e-6, y),
        (x[:39], y[:39]),
    ]  # fmt: skip
    assert want not in [value(*other, 8) for other in others]
    assert sample_digests(x[order]) == [sample_digests(x)[i] for i in order]
    large = torch.randn(2, 3, 224, 224)
    assert sample_digests(large) != sample_digests(large.flip(3))
    assert len(set(sample_digests(torch.arange(300).reshape(100, 3)))) == 100


def test_a_pass_that_ended_early_is_not_compared():
    x, y = data()
    source = Source([(x[:30], y[:30]), (x[30:], y[30:])], None)
    next(iter(source))
    source.first()
    assert source.seen is None
    assert sum(len(images) for images, _ in source) == 48
    assert source.seen is not None
    next(iter(source))


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (np.repeat([0, 1, 2], 10), True),
        (np.repeat([2, 1, 7], 10), True),
        (np.zeros(20, int), True),
        (np.arange(30) % 3, False),
        (np.arange(30), False),
        (np.random.default_rng(0).integers(0, 3, 30), False),
        (np.repeat([0, 1], 7), False),
        (np.repeat([0, 1, 0], 10), False),
        (np.zeros((20, 3)), False),
    ],
)
def test_what_is_class_order(labels, expected):
    assert in_class_order(labels) is expected


def test_sizes_that_are_known():
    x, y = data()
    assert size_of([(x, y), (x[:5], y[:5])]) == 53
    assert size_of([x, x]) == 96
    assert size_of(iter([(x, y)])) is None
    assert size_of([{"pixels": x}]) is None
    loader = DataLoader(TensorDataset(x, y), batch_size=8)
    assert size_of(loader) is None
    assert largest_size(loader) == 48
    assert largest_size(object()) is None


def by_class(n=80):
    x, _ = data(n)
    y = torch.arange(n) // (n // 10)
    return list(zip(x.split(16), y.split(16), strict=True))


NOTE = "the first 32 of 80 samples .* are in class order, of 4 classes only; shuffle"


@pytest.mark.parametrize("kind", ["list", "loader"])
def test_a_first_part_in_class_order_is_told_of(kind):
    batches = by_class()
    if kind == "loader":
        x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
        batches = DataLoader(TensorDataset(x, y), batch_size=16)
    with pytest.warns(UserWarning, match=NOTE) as caught:
        fastsal.collect(net(), batches, samples=32)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match=NOTE) as caught:
        fastsal.prune(net(), batches, 0.5, samples=32, damping=1e-3, **BUDGET)
    assert len(caught) == 1


def test_nothing_is_told_of_images_in_another_order_or_of_all():
    x, y = (torch.cat(parts) for parts in zip(*by_class(), strict=True))
    order = torch.randperm(80, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastsal.collect(net(), [(x, y)])
        fastsal.collect(net(), [(x, y)], samples=80)
        fastsal.collect(net(), [(x[order], y[order])], samples=32)
        fastsal.collect(net(), [(x, torch.zeros(80))], samples=32, curvature="features")


def test_an_image_set_tells_of_it():
    rng = np.random.default_rng(0)
    images = ImageSet(rng.integers(0, 255, (60, 4, 4, 3)).astype(np.uint8), np.arange(60) // 6)
    spec = InputSpec(3, None, (0.5,) * 3, (0.5,) * 3)
    with pytest.warns(UserWarning, match="24 of 60 images .* in class order, of 4 classes only"):
        images.batches(spec, samples=24)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images.batches(spec)
        images.batches(spec, samples=24, shuffle_seed=0)
        images.batches(spec, samples=59)  # all ten classes
