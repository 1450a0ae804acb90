"""Statistics of features = a loop with autograd; what is pruned by them keeps the features."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import timm
import torch
from torch import nn

from fastsal import BlockFisher, collect, prune
from fastsal.errors import DataError, InvalidArgument, UnsupportedLayer
from fastsal.gradients import per_sample_gradients, select_parameters
from fastsal.gradients.losses import draw_noise
from fastsal.models.features import features
from fastsal.pruning.measured import HeldOutFeatures

from ...held_out_places import held_out_mask

pytestmark = pytest.mark.usefixtures("one_thread")

FEATURES = 5


class Plain(nn.Module):
    """Features are the input of the last Linear."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.mix = nn.Linear(4, FEATURES)
        self.fc = nn.Linear(FEATURES, 3)

    def forward(self, x):
        x = torch.relu(self.bn(self.conv(x))).mean(dim=(2, 3))
        return self.fc(torch.tanh(self.mix(x)))


class Backbone(Plain):
    """No classifier: the last Linear is part of the features."""

    def forward_features(self, x):
        return Plain.forward(self, x)

    def forward(self, x):
        return self.forward_features(x)


class Table(Plain):
    """A weight that no rule serves, so that it goes through torch.func."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(4, 4))

    def forward(self, x):
        x = torch.relu(self.bn(self.conv(x))).mean(dim=(2, 3))
        return self.fc(torch.tanh(self.mix(torch.einsum("nc,cd->nd", x, self.scale))))


def made(kind, dtype=torch.float64):
    torch.manual_seed(0)
    model = kind()
    model.bn.running_mean.uniform_(-0.3, 0.3)
    return model.to(dtype).train()


def images(n, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 2, 5, 5, generator=generator, dtype=torch.float64).to(dtype)


def noise(n, width, seed):
    """Standard normal numbers by inversion, one row a sample."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.rand(width, dtype=torch.float64, generator=generator) for _ in range(n)]
    return torch.distributions.Normal(0.0, 1.0).icdf(torch.stack(rows))


def slow_rows(model, x, names, seed):
    """Gradients of `½ ‖f_θ − y‖² / F` with `y = f + √F ε`, a sample at a time."""
    model = copy.deepcopy(model).eval()
    owned = dict(model.named_parameters())
    found = {name: [] for name in names}
    with torch.no_grad():
        dense = features_with_graph(model, x)
    drawn = dense + math.sqrt(dense.shape[1]) * noise(len(x), dense.shape[1], seed)
    for image, y in zip(x, drawn):
        loss = (features_with_graph(model, image[None])[0] - y).square().sum() / 2 / len(y)
        gradients = torch.autograd.grad(loss, [owned[name] for name in names])
        for name, g in zip(names, gradients):
            found[name].append(g)
    return {name: torch.stack(rows) for name, rows in found.items()}


def features_with_graph(model, x):
    """By hand, without the package."""
    h = torch.relu(model.bn(model.conv(x))).mean(dim=(2, 3))
    if isinstance(model, Table):
        h = h @ model.scale
    h = torch.tanh(model.mix(h))
    return model.fc(h) if isinstance(model, Backbone) else h


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (Plain, ["conv.weight", "mix.weight"]),
        (Backbone, ["conv.weight", "mix.weight", "fc.weight"]),
    ],
)
@pytest.mark.parametrize("micro_batch", [1, 4, None])
def test_statistics_equal_a_loop_with_autograd(kind, names, micro_batch):
    model, x = made(kind), images(13)
    fisher = collect(
        model, [x[:6], (x[6:7], None), (x[7:], "no labels")], curvature="features", seed=3,
        precision="float64", micro_batch=micro_batch, block_size=6,
    )  # fmt: skip
    assert fisher.names == names
    want = BlockFisher({n: fisher.shapes[n] for n in names}, block_size=6, precision="float64")
    want.update(slow_rows(model, x, names, 3))
    assert fisher.samples == 13
    for name in names:
        torch.testing.assert_close(fisher.blocks(name), want.blocks(name), rtol=1e-9, atol=1e-14)
        torch.testing.assert_close(
            fisher.mean_gradient()[name], want.mean_gradient()[name], rtol=1e-9, atol=1e-12
        )


def test_weights_without_a_rule_get_the_same_draws():
    model, x, names = made(Table), images(7), ["scale", "conv.weight"]
    found = per_sample_gradients(
        model, x, None, parameters=names, curvature="features", seed=1, micro_batch=3
    )
    for name, rows in slow_rows(model, x, names, 1).items():
        torch.testing.assert_close(found[name], rows, rtol=1e-9, atol=1e-13)


def test_the_mean_over_draws_is_the_gauss_newton_matrix():
    model, x = made(Plain), images(3)
    draws = 4000
    fisher = collect(
        model, [x.repeat(draws, 1, 1, 1)], curvature="features", parameters="mix.weight",
        block_size=None, precision="float64", micro_batch=1000,
    )  # fmt: skip
    model.eval()
    want = 0
    for image in x:
        f = features_with_graph(model, image[None])[0]
        J = torch.stack(
            [torch.autograd.grad(v, model.mix.weight, retain_graph=True)[0].flatten() for v in f]
        )
        want = want + J.T @ J / FEATURES / len(x)
    found = fisher.blocks("mix.weight")[0]
    # The relative error of a mean of N squares is about √(2/N).
    assert (found - want).norm() < 5 * math.sqrt(2 / (draws * len(x))) * want.norm()
    assert fisher.mean_gradient()["mix.weight"].abs().max() < 0.02


def test_draws_do_not_depend_on_how_samples_are_cut():
    whole = draw_noise(torch.zeros(37, 5), torch.Generator().manual_seed(2))
    generator = torch.Generator().manual_seed(2)
    parts = [draw_noise(torch.zeros(n, 5), generator) for n in (1, 2, 17, 16, 1)]
    assert torch.equal(torch.cat(parts), whole)
    assert whole.dtype == torch.float32
    torch.testing.assert_close(whole.double(), noise(37, 5, 2), rtol=1e-6, atol=1e-6)


def test_labels_are_not_looked_at_and_the_model_is_left_as_found():
    model, x = made(Plain), images(8)
    model.bn.eval()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    torch.manual_seed(5)
    before = torch.get_rng_state()
    found = [
        collect(model, batches, curvature="features").blocks("mix.weight")
        for batches in ([x], [[x]], [(x, None)], [(x, torch.full((8,), -7))], [(x, ["a"] * 8)])
    ]
    assert all(torch.equal(found[0], other) for other in found[1:])
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert not model.bn.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_the_classifier_is_left_out_where_features_do_not_need_it():
    x = images(8)
    chosen = {
        kind: [collect(made(kind), [x], curvature="features", parameters=asked).names
               for asked in (None, "*", ["!conv.*"])]
        for kind in (Plain, Backbone)
    }  # fmt: skip
    assert chosen[Plain] == [["conv.weight", "mix.weight"]] * 2 + [["mix.weight"]]
    assert chosen[Backbone] == [["conv.weight", "mix.weight", "fc.weight"]] * 2 + [
        ["mix.weight", "fc.weight"]
    ]
    with pytest.raises(UnsupportedLayer, match=r"no gradient reaches fc\.weight"):
        collect(made(Plain), [x], curvature="features", parameters="fc.weight")
    with pytest.raises(
        InvalidArgument,
        match="parameters must include weights before the classifier of Plain .*got fc.weight",
    ):
        collect(made(Plain), [x], curvature="features", parameters="f*")


def test_what_is_not_taken():
    model, x = made(Plain), images(4)
    with pytest.raises(
        InvalidArgument,
        match="^curvature must be 'empirical', 'sampled' or 'features', got 'feature'",
    ):
        collect(model, [(x, None)], curvature="feature")
    with pytest.raises(InvalidArgument, match="^loss must not be given with curvature='features'"):
        collect(model, [x], curvature="features", loss=lambda out, y: out.sum(1))
    with pytest.raises(DataError, match="^batches must contain at least one batch"):
        collect(model, [], curvature="features")
    with pytest.raises(UnsupportedLayer, match="neither forward_features nor a Linear"):
        collect(nn.Conv2d(2, 3, 3), [x.float()], curvature="features")


@pytest.mark.parametrize(
    ("name", "options", "pixels"),
    [
        ("vit_tiny_patch16_224", {"num_classes": 0, "depth": 2, "img_size": 32}, 32),
        ("test_vit", {"num_classes": 10}, 160),
        ("test_resnet", {"num_classes": 10, "zero_init_last": False}, 64),
    ],
)
def test_timm_models_with_and_without_a_classifier(name, options, pixels):
    torch.manual_seed(0)
    model = timm.create_model(name, **options)
    x = torch.randn(6, 3, pixels, pixels)
    fisher = collect(model, [x], curvature="features", micro_batch=3)
    expected = [n for n in select_parameters(model) if not n.startswith(("head.", "fc."))]
    assert fisher.names == expected
    assert all(float(d.sum()) > 0 for d in fisher.diagonal().values())
    before = features(model.eval(), x)
    result = prune(model, [x], 0.3, curvature="features", samples=6, damping=1e-4)
    assert list(result.masks) == expected
    after = features(model, x)
    assert (after - before).square().mean() < 0.5 * before.square().mean()


def matching_loss(model, x, target):
    return float((features(model, x) - target).square().mean()) / 2


def test_predicted_increase_is_that_of_the_feature_loss():
    model, x = made(Plain).eval(), images(2000)
    target = features(model, x)
    result = prune(model, [x], 0.06, curvature="features", damping=1e-9, precision="float64")
    measured = matching_loss(model, x, target)
    predicted = result.history[0].predicted_increase
    assert measured > 1e-9
    assert predicted == pytest.approx(measured, rel=0.3)


def test_held_out_loss_is_that_of_the_dense_features():
    model, x = made(Plain, torch.float32).eval(), images(40, dtype=torch.float32)
    held = HeldOutFeatures.of(model, [(x[:30], None), (x[30:], torch.zeros(10))])
    dense = features(model, x)
    assert held.samples == 40
    assert held.mean_loss(model) == 0
    cap = float(dense.double().var(0, correction=0).mean()) / 2
    assert held.cap == pytest.approx(cap)
    with torch.no_grad():
        model.conv.weight *= 1.3
    each = (features(model, x) - dense).square().mean(1) / 2
    cap = float(each.median())
    held = replace(held, cap=cap)
    assert held.mean_loss(model) == pytest.approx(float(each.clamp(max=cap).mean()))
    assert HeldOutFeatures.of(model, [(x[:1], None)]).cap == math.inf


def test_auto_damping_takes_the_least_held_out_feature_loss():
    model, x = made(Plain, torch.float32), images(400, dtype=torch.float32)
    dense = copy.deepcopy(model).eval()
    result = prune(model, iter([x[:100], x[100:]]), 0.4, curvature="features", samples=400)
    evidence = result.history[0].damping_evidence
    assert min(evidence, key=lambda pair: pair[1])[0] == result.history[0].damping
    assert result.history[0].samples in (350, 400)
    target = features(dense, x)
    random = copy.deepcopy(dense)
    prune(random, [x], 0.4, curvature="features", criterion="random", compensate=False)
    assert matching_loss(model.eval(), x, target) < 0.2 * matching_loss(random, x, target)
    # The classifier is as it was, in every case.
    for other in (model, random):
        assert torch.equal(other.fc.weight, dense.fc.weight)


def test_a_later_round_is_measured_by_the_dense_features():
    model, x = made(Plain, torch.float32), images(160, dtype=torch.float32)
    dense = copy.deepcopy(model)
    result = prune(model, [x], 0.5, curvature="features", rounds=2, recalibrate=True)
    report = result.history[1].recalibration
    held = HeldOutFeatures.of(dense, [(x[held_out_mask(160)], None)])
    last = report.after if report.kept else report.before
    assert held.mean_loss(model) == pytest.approx(last, rel=1e-5)
    assert last > 0


def test_without_images_the_last_linear_is_the_classifier():
    model = made(Plain)
    result = prune(model, None, 0.5, curvature="features", criterion="magnitude", compensate=False)
    assert list(result.masks) == ["conv.weight", "mix.weight"]


def test_a_limit_still_uses_the_labels():
    model, x = made(Plain, torch.float32), images(400, dtype=torch.float32)
    y = model.eval()(x).argmax(1)
    result = prune(model, [(x, y)], curvature="features", max_accuracy_drop=0.2)
    assert result.safety is not None
    assert 0 < result.masks.sparsity < 1
    with pytest.raises(DataError, match="a limit is tested on labeled images"):
        prune(made(Plain, torch.float32), [x], curvature="features", max_accuracy_drop=0.2)
