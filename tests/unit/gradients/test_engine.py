"""Contract of the engine: state, errors, labels, losses, precision."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastsal.errors import (
    DataError,
    InvalidArgument,
    NonFiniteGradient,
    UnknownParameter,
    UnsupportedLayer,
)
from fastsal.gradients import GradientEngine, per_sample_gradients, select_parameters

from .oracle import loop


def net(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Dropout(0.5),
        nn.Flatten(), nn.Linear(12, 5),
    ).to(dtype)  # fmt: skip


def data(n=4, dtype=torch.float64):
    torch.manual_seed(1)
    return torch.randn(n, 2, 4, 4, dtype=dtype), torch.arange(n) % 5


def ignore(name, rows):
    pass


def engine_for(model, **options):
    return GradientEngine(model, select_parameters(model), **options)


def snapshot(model):
    return (
        [m.training for m in model.modules()],
        [p.requires_grad for p in model.parameters()],
        [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        copy.deepcopy(model.state_dict()),
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        [len(p._backward_hooks or {}) for p in model.parameters()],
    )


def assert_same(before, after):
    for a, b in zip(before, after, strict=True):
        if isinstance(a, dict):
            assert all(torch.equal(a[k], b[k]) for k in a)
        else:
            assert len(a) == len(b)
            for u, v in zip(a, b, strict=True):
                assert torch.equal(u, v) if isinstance(u, torch.Tensor) else u == v


@pytest.mark.parametrize("fail", [False, True])
def test_model_and_randomness_are_restored(fail):
    model = net()
    model.train()
    model[1].eval()
    model[0].bias.requires_grad_(False)
    model[5].weight.grad = torch.ones_like(model[5].weight)
    images, labels = data()
    before, rng = snapshot(model), torch.get_rng_state()

    def sink(name, rows):
        torch.rand(3)
        if fail:
            raise KeyboardInterrupt

    try:
        with engine_for(model) as engine:
            assert not any(m.training for m in model.modules())
            engine.run(images, labels, sink)
    except KeyboardInterrupt:
        assert fail
    assert_same(before, snapshot(model))
    assert torch.equal(rng, torch.get_rng_state())


def test_engine_goes_on_after_an_exception_in_the_sink():
    model = net()
    images, labels = data()

    def sink(name, rows):
        raise ZeroDivisionError

    rows = {}
    with engine_for(model) as engine:
        with pytest.raises(ZeroDivisionError):
            engine.run(images, labels, sink)
        engine.run(images, labels, lambda k, v: rows.__setitem__(k, v.clone()))
    expected = loop(model, images, labels, list(rows))
    torch.testing.assert_close(rows, expected)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inside_no_grad(mode):
    model = net()
    with mode():
        images, labels = data()
        rows = per_sample_gradients(model, images, labels)
    images, labels = data()
    torch.testing.assert_close(rows, loop(model, images, labels, list(rows)))


def test_losses_and_offset():
    model = net()
    images, labels = data()
    model.eval()
    expected = F.cross_entropy(model(images), labels, reduction="none").float()
    with engine_for(model, micro_batch=3) as engine:
        losses = engine.run(images, labels, ignore)
        assert engine.samples_seen == 4
        torch.testing.assert_close(losses, expected)
        bad = images.clone()
        bad[3] = float("nan")
        with pytest.raises(NonFiniteGradient, match="sample 7"):
            engine.run(bad, labels, ignore)


def test_nonfinite_in_the_first_batch():
    images, labels = data()
    images[1] = float("inf")
    with engine_for(net()) as engine, pytest.raises(NonFiniteGradient, match="sample 1"):
        engine.run(images, labels, ignore)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            torch.tensor([0, 1, 2, 12]),
            r"labels must be in \[0, 4\] for this model, got 12 for sample 3",
        ),
        (torch.tensor([0, -1, 2, 3]), "must be .*, got -1 for sample 1"),
        (torch.tensor([0, 1, 2]), r"labels must be \[4\], one label per sample"),
        (torch.zeros(4), "integers"),
        (torch.zeros(4, 5, dtype=torch.long), r"class indices \[n\]"),
        (torch.zeros(4, dtype=torch.bool), "integers"),
        (None, "sampled"),
        ([0, 1, 2, 3], "list"),
    ],
)
def test_wrong_labels(labels, message):
    images, right = data()
    calls = []
    for warm in (False, True):
        with engine_for(net(), micro_batch=2) as engine:
            if warm:
                engine.run(images, right, ignore)
                message = message.replace("sample 3", "sample 7").replace("sample 1", "sample 5")
            with pytest.raises(DataError, match=message):
                engine.run(images, labels, lambda name, rows: calls.append(name))
    assert not calls


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 2, 4, 4, dtype=torch.uint8), "floating point"),
        (torch.zeros(0, 2, 4, 4), "must contain at least one sample"),
        (torch.zeros(4), "shape"),
        ("x", "str"),
    ],
)
def test_wrong_images(images, message):
    with engine_for(net()) as engine, pytest.raises(DataError, match=message):
        engine.run(images, torch.zeros(2, dtype=torch.long), ignore)


def test_small_integer_labels_and_other_dtypes():
    model = net()
    images, labels = data()
    rows = per_sample_gradients(model, images.float().double(), labels)
    again = per_sample_gradients(model, images.float(), labels.to(torch.uint8))
    torch.testing.assert_close(rows, again)


def test_sampled_labels():
    model = net().eval()
    images, _ = data()
    wide = images.repeat(8, 1, 1, 1)

    def labels_of(seed, micro_batch):
        drawn = []

        def loss(outputs, labels):
            drawn.append(labels)
            return F.cross_entropy(outputs, labels, reduction="none")

        with engine_for(
            model, loss=loss, curvature="sampled", seed=seed, micro_batch=micro_batch
        ) as engine:
            engine.run(wide, None, ignore)
        return torch.cat(drawn[1:])  # the first call is the probe's

    first = labels_of(3, 32)
    assert first.unique().numel() > 1
    assert torch.equal(first, labels_of(3, 5))
    assert not torch.equal(first, labels_of(4, 32))


def test_sampled_gradients_equal_true_ones_at_these_labels():
    model = net().eval()
    images, _ = data()
    rows = per_sample_gradients(model, images, None, curvature="sampled", seed=5)
    uniforms = torch.rand(4, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    cumulative = model(images).softmax(1).cumsum(1)
    labels = (cumulative <= uniforms[:, None]).sum(1)
    torch.testing.assert_close(rows, loop(model, images, labels, list(rows)))


def test_callable_loss():
    def loss(outputs, targets):
        return (outputs - targets).square().sum(1)

    model = net()
    images, _ = data()
    targets = torch.randn(4, 5, dtype=torch.float64)
    rows = per_sample_gradients(model, images, targets, loss=loss)
    torch.testing.assert_close(rows, loop(model, images, targets, list(rows), loss))


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (F.cross_entropy, r"one loss per sample, \[2\].*got \[\]"),
        (lambda o, t: 1.0, "float"),
        ("hinge", "hinge"),
    ],
)
def test_wrong_loss(loss, message):
    images, labels = data()
    with pytest.raises(InvalidArgument, match=message):
        per_sample_gradients(net(), images, labels, loss=loss)


class Returns(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.fc = nn.Linear(4, 4).double()
        self.function = function

    def forward(self, x):
        return self.function(self.fc, x)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda fc, x: (fc(x), 1), "tuple"),
        (lambda fc, x: fc(x)[:, None], r"\[2, 1, 4\]"),
    ],
)
def test_outputs_that_are_not_logits(function, message):
    images, labels = torch.randn(3, 4).double(), torch.zeros(3, dtype=torch.long)
    with pytest.raises(InvalidArgument, match=message):
        per_sample_gradients(Returns(function), images, labels)


def test_unused_parameter():
    model = nn.ModuleDict({"used": nn.Linear(4, 4), "idle": nn.Linear(4, 4)})
    model.forward = model["used"].forward
    images, labels = torch.randn(3, 4), torch.zeros(3, dtype=torch.long)
    with pytest.raises(UnsupportedLayer, match=r"idle\.weight.*parameters="):
        per_sample_gradients(model, images, labels)
    rows = per_sample_gradients(model, images, labels, parameters="!idle.*")
    assert list(rows) == ["used.weight"]


@pytest.mark.parametrize("where", ["no_grad", "detach"])
def test_parameter_cut_off_from_the_loss(where):
    def function(fc, x):
        if where == "detach":
            return fc(x).detach()
        with torch.no_grad():
            return fc(x)

    images, labels = torch.randn(3, 4).double(), torch.zeros(3, dtype=torch.long)
    with pytest.raises(UnsupportedLayer, match=r"fc\.weight"):
        per_sample_gradients(Returns(function), images, labels)


def test_frozen_backbone_under_no_grad():
    model = nn.ModuleDict({"back": nn.Linear(4, 4), "head": nn.Linear(4, 3)}).double()

    def forward(x):
        with torch.no_grad():
            x = model["back"](x)
        return model["head"](x)

    model.forward = forward
    images, labels = torch.randn(3, 4).double(), torch.zeros(3, dtype=torch.long)
    rows = per_sample_gradients(model, images, labels, parameters="head.weight")
    torch.testing.assert_close(rows, loop(model, images, labels, list(rows)))


def test_batch_statistics_are_refused():
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3, track_running_stats=False), nn.Flatten(),
        nn.Linear(12, 5),
    ).double()  # fmt: skip
    with pytest.raises(UnsupportedLayer, match="batch statistics"):
        per_sample_gradients(model, *data())


@pytest.mark.parametrize("function", [lambda y: y - y[:1], lambda y: y + y.roll(1, 0)])
def test_samples_that_mix_are_refused(function):
    images, labels = torch.randn(3, 4).double(), torch.zeros(3, dtype=torch.long)
    with pytest.raises(UnsupportedLayer, match="other samples"):
        per_sample_gradients(Returns(lambda fc, x: function(fc(x))), images, labels)


def test_input_changed_in_place_after_the_layer():
    def function(fc, x):
        x = x * 2
        y = fc(x)
        x.mul_(3)
        return y

    images, labels = torch.randn(3, 4).double(), torch.zeros(3, dtype=torch.long)
    with pytest.raises(UnsupportedLayer, match=r"fc\.weight.*in place"):
        per_sample_gradients(Returns(function), images, labels)


def test_fallback_that_fails_says_why():
    calls = []

    def function(fc, x):
        calls.append(len(x))
        if len(calls) > 2:  # after the two samples of the test, and the pass for the losses
            raise RuntimeError("takes at least two samples")
        return x @ fc.weight.t()

    images, labels = torch.randn(3, 4).double(), torch.zeros(3, dtype=torch.long)
    with pytest.raises(UnsupportedLayer, match=r"fc\.weight.*torch\.func.*at least two samples"):
        per_sample_gradients(Returns(function), images, labels)


def test_parameter_that_a_later_batch_does_not_use():
    def function(fc, x):
        return fc(x) if x.sum() > 0 else x * 1.0

    model = Returns(function)
    images, labels = torch.rand(4, 4).double(), torch.zeros(4, dtype=torch.long)
    images[2:] *= -1
    images[:2] += 5
    rows = per_sample_gradients(model, images, labels, micro_batch=2)["fc.weight"]
    assert rows[:2].any()
    assert not rows[2:].any()


def test_bfloat16_autocast():
    model = net(torch.float32).eval()
    images, labels = data(dtype=torch.float32)
    rows = per_sample_gradients(model, images, labels, autocast=torch.bfloat16)
    expected = loop(model, images, labels, list(rows))
    for name, value in rows.items():
        assert value.dtype == torch.float32
        assert float((value - expected[name]).norm() / expected[name].norm()) < 0.05


def test_bfloat16_model():
    model = net(torch.bfloat16).eval()
    images, labels = data(dtype=torch.float32)
    rows = per_sample_gradients(model, images, labels)
    expected = loop(net(torch.float32), images, labels, list(rows))
    for name, value in rows.items():
        assert value.dtype == torch.float32
        assert float((value.float() - expected[name]).norm() / expected[name].norm()) < 0.1


def test_channels_last():
    model = net()
    images, labels = data()
    expected = loop(model, images, labels, ["0.weight", "5.weight"])
    model = model.to(memory_format=torch.channels_last)
    rows = per_sample_gradients(model, images.contiguous(memory_format=torch.channels_last), labels)
    torch.testing.assert_close(rows, expected)


def test_sink_is_called_once_a_parameter_and_micro_batch():
    model = net()
    images, labels = data()
    calls = []
    with engine_for(model, micro_batch=3) as engine:
        assert engine.operations == {}
        engine.run(images, labels, lambda name, rows: calls.append((name, len(rows))))
        assert engine.operations == {"0.weight": "conv2d", "5.weight": "linear"}
    assert calls == [("5.weight", 3), ("0.weight", 3), ("5.weight", 1), ("0.weight", 1)]


def test_wrong_use():
    model = net()
    selected = select_parameters(model)
    with pytest.raises(InvalidArgument, match="with engine"):
        GradientEngine(model, selected).run(*data(), ignore)
    with pytest.raises(UnknownParameter, match=r"5\.weight"):
        GradientEngine(net(), {"5.weight": selected["5.weight"]})
    for options in ({"curvature": "drawn"}, {"micro_batch": 0}, {"autocast": torch.float32}):
        with pytest.raises(InvalidArgument, match=next(iter(options))):
            GradientEngine(model, selected, **options)
    with pytest.raises(InvalidArgument, match="must contain at least one parameter"):
        GradientEngine(model, {})


@pytest.mark.parametrize("number", [np.int64, torch.tensor])
def test_numpy_and_torch_scalars_are_numbers(number):
    model, images = nn.Linear(3, 4), torch.randn(6, 3)
    given = {"curvature": "sampled", "seed": 5, "micro_batch": 2, "loss_scale": 2}
    expected = per_sample_gradients(model, images, None, **given)
    scalars = {"seed": number(5), "micro_batch": number(2), "loss_scale": number(2)}
    found = per_sample_gradients(model, images, None, **{**given, **scalars})
    assert torch.equal(found["weight"], expected["weight"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"micro_batch": True}, "micro_batch must be an integer, got True"),
        ({"micro_batch": 0}, "micro_batch must be at least 1, got 0"),
        ({"seed": 1.5}, "seed must be an integer, got 1.5"),
        (
            {"curvature": "true"},
            "curvature must be 'empirical', 'sampled' or 'features', got 'true'",
        ),
    ],
)
def test_arguments_that_are_not_valid(given, message):
    with pytest.raises(InvalidArgument, match=f"^{message}"):
        per_sample_gradients(nn.Linear(3, 4), torch.randn(2, 3), torch.zeros(2).long(), **given)
