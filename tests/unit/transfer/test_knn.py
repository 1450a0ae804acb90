from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fastsal.errors import InvalidArgument
from fastsal.models.inputs import InputSpec
from fastsal.transfer.knn import fit_knn

pytestmark = pytest.mark.usefixtures("one_thread")

SPEC = InputSpec(3, None, (0.5,) * 3, (0.5,) * 3)


def clouds(n, classes=4, features=6, seed=0):
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(9).normal(size=(classes, features))
    y = rng.integers(0, classes, n)
    y[:classes] = np.arange(classes)
    x = centres[y] + rng.normal(size=(n, features))
    return torch.from_numpy(x).float(), torch.from_numpy(y)


def shares_by_loop(bank, labels, x, classes, k, temperature, left_out=None):
    """The same by the definition, one image at a time."""
    found = []
    for row in range(len(x)):
        votes = []
        for i in range(len(bank)):
            if left_out is not None and i == left_out[row]:
                continue
            a, b = x[row].double(), bank[i].double()
            votes.append((float(a @ b / (a.norm() * b.norm())), int(labels[i])))
        shares = [0.0] * classes
        for similarity, label in sorted(votes, reverse=True)[:k]:
            shares[label] += math.exp(similarity / temperature)
        found.append([share / sum(shares) for share in shares])
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (5, 0.07), (20, 1.0), (39, 0.5)])
def test_votes_equal_a_loop_over_all_images(k, temperature):
    bank, labels = clouds(40)
    x, _ = clouds(25, seed=1)
    head = fit_knn("t", bank, labels, tuple("abcd"), SPEC, k=k, temperature=temperature)
    expected = shares_by_loop(bank, labels, x, 4, k, temperature)
    torch.testing.assert_close(head(x), expected, atol=2e-5, rtol=1e-4)
    assert (head(x).argmax(1) == expected.argmax(1)).all()
    torch.testing.assert_close(head(x).sum(1), torch.ones(25, dtype=torch.float64))
    some = torch.tensor([3, 0, 17])
    without = shares_by_loop(bank, labels, bank[some], 4, k, temperature, left_out=some)
    torch.testing.assert_close(head.left_out(some), without, atol=2e-5, rtol=1e-4)


def test_votes_do_not_depend_on_length_nor_overflow():
    bank, labels = clouds(40)
    x, _ = clouds(25, seed=1)
    head = fit_knn("t", bank, labels, tuple("abcd"), SPEC, k=5)
    longer = fit_knn("t", bank * torch.rand(40, 1).add(0.1), labels, tuple("abcd"), SPEC, k=5)
    torch.testing.assert_close(head(100 * x), longer(x), atol=1e-4, rtol=1e-3)
    cold = fit_knn("t", bank, labels, tuple("abcd"), SPEC, k=5, temperature=1e-6)
    nearest = fit_knn("t", bank, labels, tuple("abcd"), SPEC, k=1)
    torch.testing.assert_close(cold(x), nearest(x))


def test_many_images_are_compared_in_pieces():
    bank, labels = clouds(2500)
    head = fit_knn("t", bank, labels, tuple("abcd"), SPEC)
    x, _ = clouds(2100, seed=1)
    torch.testing.assert_close(head(x)[1500:1510], head(x[1500:1510]), atol=1e-4, rtol=1e-3)
    assert head(x[:0]).shape == (0, 4)


def test_the_scale_is_that_of_least_loss_on_images_left_out():
    bank, labels = clouds(400)
    head = fit_knn("t", bank, labels, tuple("abcd"), SPEC)
    shares = head.left_out(torch.arange(400))
    weight = 1 / torch.bincount(labels).double()
    loss = [
        float(torch.nn.functional.cross_entropy(s * head.scale * shares, labels, weight))
        for s in (0.8, 1.0, 1.25)
    ]
    assert loss[1] == min(loss)


def test_rows_that_are_not_finite_are_marked_alone():
    bank, labels = clouds(40)
    head = fit_knn("t", bank, labels, tuple("abcd"), SPEC, k=5)
    x, _ = clouds(3, classes=3, seed=1)
    x[1, 2] = torch.inf
    found = head(x)
    assert found[1].isnan().all()
    assert found[[0, 2]].isfinite().all()
    zeros = head(torch.zeros(2, 6))  # a dead backbone: all similarities are 0
    assert zeros.isfinite().all()


def test_more_neighbours_than_images():
    bank, labels = clouds(20)
    with pytest.raises(
        InvalidArgument, match=r"k must be in \[1, 19\] for the 20 fit images of task 't', got 20"
    ):
        fit_knn("t", bank, labels, tuple("abcd"), SPEC, k=20)
