from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fastsal.data.image_set import ImageSet
from fastsal.errors import DataError, FactorizationError, InvalidArgument, UnsupportedLayer
from fastsal.models.features import features
from fastsal.models.inputs import InputSpec
from fastsal.models.loading import load_model
from fastsal.transfer.evaluation import evaluate
from fastsal.transfer.heads import fit_heads
from fastsal.transfer.ridge import solve_ridge
from fastsal.transfer.tasks import Task

pytestmark = pytest.mark.usefixtures("one_thread")

SPEC = InputSpec(3, None, (0.5,) * 3, (0.5,) * 3)


class Flat(nn.Module):
    """Features are the pixels themselves."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(48, 3)

    def forward(self, x):
        return self.fc(x.flatten(1))


def task(n=90, seed=0, name="t", shift=60, counts=None):
    rng = np.random.default_rng(seed)
    y = np.sort(rng.integers(0, 3, n)) if seed else np.repeat([0, 1, 2], counts or [n - 30, 20, 10])
    x = rng.integers(0, 100, (n, 4, 4, 3))
    x[np.arange(n), :, :, y] += shift
    images = ImageSet(x.astype(np.uint8), y.astype(np.int64), ("a", "b", "c"))
    return Task.split(name, images, seed=seed)


@pytest.mark.parametrize("counts", [[60, 20, 10], [30, 30, 30], [4, 4, 82]])
@pytest.mark.parametrize("ridge", [1e-3, 0.1, 10.0])
def test_head_equals_the_ridge_of_scikit_learn(ridge, counts):
    linear_model = pytest.importorskip("sklearn.linear_model", reason="needs scikit-learn")
    t = task(counts=counts)
    head = fit_heads(Flat(), t, ridge=ridge, spec=SPEC, batch_size=7)["t"]
    x = np.concatenate([x.flatten(1).numpy() for x, _ in t.fit.batches(SPEC)]).astype(np.float64)
    y = t.fit.y
    weights = len(y) / (3 * np.bincount(y))[y]
    reference = linear_model.Ridge(alpha=head.alpha, solver="cholesky")
    reference.fit(x, np.eye(3)[y], sample_weight=weights)
    np.testing.assert_allclose(head.weight.numpy(), reference.coef_, atol=1e-6, rtol=0)
    np.testing.assert_allclose(head.bias.numpy(), reference.intercept_, atol=1e-6, rtol=0)
    np.testing.assert_allclose(
        head(torch.from_numpy(x)).numpy(), reference.predict(x), atol=1e-6, rtol=0
    )


def test_alpha_follows_the_scale_of_the_features():
    narrow = fit_heads(Flat(), task(), spec=SPEC)["t"]
    half = InputSpec(3, None, (0.5,) * 3, (0.25,) * 3)  # features twice as large
    wide = fit_heads(Flat(), task(), spec=half)["t"]
    assert wide.alpha == pytest.approx(4 * narrow.alpha, rel=1e-5)
    torch.testing.assert_close(wide.weight * 2, narrow.weight, atol=1e-6, rtol=1e-4)


def test_linear_is_the_scaled_head_and_frozen():
    t = task(600, shift=25)
    head = fit_heads(Flat(), t, spec=SPEC)["t"]
    layer = head.linear()
    x = torch.cat([x.flatten(1) for x, _ in t.test.batches(SPEC)])
    torch.testing.assert_close(layer(x), (head.scale * head(x)).float(), atol=1e-4, rtol=1e-4)
    assert not any(p.requires_grad for p in layer.parameters())
    y = torch.from_numpy(t.test.y)
    balance = 1 / torch.bincount(y).double()  # the scale is fitted with balanced weights
    loss = [
        float(nn.functional.cross_entropy(s * head.scale * head(x), y, balance))
        for s in (0.2, 1.0, 5.0)
    ]
    assert loss[1] == min(loss)


def test_left_out_outputs_are_those_of_a_head_fitted_without_the_image():
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(20, 5, generator=rng)
    y = torch.arange(20) % 2
    counts = torch.bincount(y)
    _, _, alpha, left_out = solve_ridge(x, y, counts, 0.1)
    keep = torch.arange(20) != 3
    a = torch.cat([x, torch.ones(20, 1)], dim=1).double()[keep]
    penalty = alpha * torch.diag(torch.tensor([1.0] * 5 + [0.0], dtype=torch.float64))
    target = nn.functional.one_hot(y, 2).double()[keep]
    w = torch.linalg.solve(a.T @ a + penalty, a.T @ target)
    expected = torch.cat([x[3], torch.ones(1)]).double() @ w
    torch.testing.assert_close(left_out[3], expected)


def test_batches_given_by_hand_are_taken():
    t = task()
    by_hand = Task("t", list(t.fit.batches(SPEC)), list(t.test.batches(SPEC)))
    a = fit_heads(Flat(), [by_hand], spec=SPEC)["t"]
    b = fit_heads(Flat(), [t], spec=SPEC)["t"]
    assert torch.equal(a.weight, b.weight)
    assert a.classes == ("0", "1", "2")


def test_the_model_is_left_as_found(tiny_file):
    model = load_model(f"{tiny_file}:tiny").train()
    model.bn.eval()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    fit_heads(model, task(), spec=SPEC)
    assert model.training
    assert not model.bn.training
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_features_of_every_kind_of_model(tiny_file):
    images = torch.randn(2, 3, 160, 160)
    for name in ("test_resnet", "test_vit", "test_efficientnet"):
        model = load_model(name)
        found = features(model, images)
        assert found.ndim == 2
        torch.testing.assert_close(model.get_classifier()(found), model(images))
    assert features(load_model(f"{tiny_file}:tiny"), images).shape == (2, 8)
    assert features(Flat(), images[:, :, :4, :4]).shape == (2, 48)
    with pytest.raises(UnsupportedLayer, match="neither forward_features nor a Linear"):
        features(nn.Conv2d(3, 4, 3), images)


@pytest.mark.parametrize("kind", ["ridge", "knn", "probe"])
def test_a_timm_model_may_come_without_a_classifier(kind):
    rng = np.random.default_rng(0)
    y = np.arange(40) % 2
    x = rng.integers(0, 99, (40, 32, 32, 3)) + 100 * y[:, None, None, None]
    t = Task.split("t", ImageSet(x.astype(np.uint8), y))
    spec = InputSpec(3, None, (0.5,) * 3, (0.5,) * 3)
    model = load_model("test_resnet")
    whole = fit_heads(model, t, kind=kind, k=5, l2=0.1, spec=spec)["t"]
    model.reset_classifier(0)
    bare = fit_heads(model, t, kind=kind, k=5, l2=0.1, spec=spec)["t"]
    x = torch.randn(3, bare.features)
    assert torch.equal(bare(x), whole(x))
    assert evaluate(model, t, {"t": bare})["t"] > 0.7
    with pytest.raises(
        InvalidArgument, match="must have a classifier for kind 'own', got a ResNet"
    ):
        fit_heads(model, t, kind="own", spec=spec)


def test_bad_fits():
    t = task()
    for given, message in (
        ({"kind": "rigde"}, "kind must be 'ridge', .* or 'own', got 'rigde'; did you mean 'ridge'"),
        ({"kind": "knn", "k": 0}, "k must be at least 1, got 0"),
        ({"kind": "knn", "k": 2.5}, "k must be an integer, got 2.5"),
        ({"kind": "knn", "temperature": 0}, "temperature must be positive, got 0"),
        ({"kind": "probe", "l2": 0}, "l2 must be positive, got 0"),
        ({"ridge": float("nan")}, "ridge must be at least 0, got nan"),
        ({"columns": ["a"]}, "columns must be None for kind 'ridge'"),
    ):
        with pytest.raises(InvalidArgument, match=message):
            fit_heads(Flat(), t, spec=SPEC, **given)
    with pytest.raises(InvalidArgument, match="ridge must be at least 0, got -1"):
        fit_heads(Flat(), t, ridge=-1, spec=SPEC)
    with pytest.raises(FactorizationError, match="ridge must be larger, got 0"):
        fit_heads(Flat(), task(36), ridge=0, spec=SPEC)
    two = Task("t", t.fit.subset(np.flatnonzero(t.fit.y < 2)), t.test)
    with pytest.raises(DataError, match="no image of class 'c'"):
        fit_heads(Flat(), two, spec=SPEC)
    with pytest.raises(InvalidArgument, match="tasks must have distinct names, got"):
        fit_heads(Flat(), [t, t], spec=SPEC)
    with pytest.raises(InvalidArgument, match="tasks must be one or more"):
        fit_heads(Flat(), [], spec=SPEC)


def test_tasks_do_not_test_on_what_they_fit():
    t = task()
    with pytest.raises(
        DataError, match=r"task 't' must be disjoint, but 'test' and 'fit' share \d+ images"
    ):
        Task("t", t.fit, t.fit)
    with pytest.raises(InvalidArgument, match="can be iterated only once"):
        Task("t", iter(t.fit.batches(SPEC)), t.test)
    with pytest.raises(InvalidArgument, match=r"fit must be in \(0, 1\), got 1"):
        Task.split("t", t.fit, fit=1)
    other = ImageSet(t.test.x, t.test.y, ("a", "b", "d"))
    with pytest.raises(DataError, match="classes"):
        Task("t", t.fit, other)


@pytest.mark.parametrize("kind", [np, torch], ids=["NumPy", "PyTorch"])
def test_numbers_may_be_scalars_of_arrays(kind):
    def scalar(value):
        return np.array(value)[()] if kind is np else torch.tensor(value)

    t = Task.split("t", task().fit, fit=scalar(0.5), seed=0)
    for given in (
        {"kind": "ridge", "ridge": 0.5},
        {"kind": "knn", "k": 3, "temperature": 0.25},
        {"kind": "probe", "l2": 0.5, "seed": 1},
    ):
        want = fit_heads(Flat(), t, spec=SPEC, **given)["t"]
        scalars = {k: v if k == "kind" else scalar(v) for k, v in given.items()}
        found = fit_heads(Flat(), t, spec=SPEC, **scalars)["t"]
        x = torch.randn(4, want.features)
        assert torch.equal(found(x), want(x))


def test_heads_and_tasks_are_shown_in_one_line():
    t = task()
    assert repr(t) == f"Task('t', fit={len(t.fit)}, test={len(t.test)})"
    ridge = fit_heads(Flat(), t, spec=SPEC)["t"]
    knn = fit_heads(Flat(), t, kind="knn", k=3, spec=SPEC)["t"]
    assert repr(ridge).startswith(f"Head('t', ridge, {ridge.features} features, 3 classes, alpha=")
    assert repr(knn).startswith(f"KnnHead('t', {len(t.fit)} images, {knn.features} features, 3 c")
