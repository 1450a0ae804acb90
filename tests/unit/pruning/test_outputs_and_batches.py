"""Models that return dicts or tuples, and batches of other forms, through every function."""

from __future__ import annotations

from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastsal
from fastsal.errors import DataError, InvalidArgument
from fastsal.transfer.evaluation import accuracy, measure
from fastsal.transfer.headed import Headed

pytestmark = pytest.mark.usefixtures("one_thread")

Two = namedtuple("Two", ["logits", "hidden"])
FORMS = {
    "dict": lambda out, hidden: {"hidden": hidden, "logits": out},
    "tuple": lambda out, hidden: (out, hidden),
    "list": lambda out, hidden: [out, hidden],
    "named tuple": Two,
    "object": lambda out, hidden: SimpleNamespace(logits=out, hidden=hidden),
}


class Net(nn.Module):
    def __init__(self, form=None):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 3)
        self.form = form

    def forward(self, x):
        hidden = torch.relu(self.bn(self.conv(x))).mean(dim=(2, 3))
        out = self.fc(hidden)
        return out if self.form is None else self.form(out, hidden)


def data(n=48):
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(n) % 3
    x = torch.randn(n, 3, 6, 6, generator=generator)
    x[torch.arange(n), y] += 1
    return list(zip(x.split(16), y.split(16)))


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def of_dict(out, labels):
    """A loss of the user, of what the model returns."""
    return F.cross_entropy(out["logits"], labels, reduction="none") + out["hidden"].square().mean(1)


@pytest.fixture(params=FORMS.values(), ids=FORMS)
def form(request):
    return request.param


OPTIONS = [
    {"sparsity": 0.5},  # damping="auto"
    {"sparsity": 0.5, "curvature": "sampled"},
    {"sparsity": 0.5, "curvature": "features"},
    {"sparsity": 0.5, "recalibrate": True, "damping": 0.1},
    {"max_loss_increase": 0.5},
    {"max_accuracy_drop": 0.9, "confidence": 0.5},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_pruning_does_not_depend_on_the_form_of_the_output(form, options):
    plain, other = Net().eval(), Net(form).eval()
    expected = fastsal.prune(plain, data(), block_size=16, **options)
    found = fastsal.prune(other, data(), block_size=16, **options)
    assert found.masks == expected.masks
    assert same(plain.state_dict(), other.state_dict())
    if expected.safety is not None:
        assert found.safety.curve == expected.safety.curve


@pytest.mark.parametrize("curvature", ["sampled", "features"])
def test_pruning_without_labels(form, curvature):
    plain, other = Net().eval(), Net(form).eval()
    images = [x for x, _ in data()]
    options = {"sparsity": 0.5, "curvature": curvature, "block_size": 16}
    expected = fastsal.prune(plain, images, **options)
    assert fastsal.prune(other, images, **options).masks == expected.masks


@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[3], OPTIONS[4]], ids=str)
def test_a_loss_of_the_user_gets_what_the_model_returns(options):
    seen = []

    def loss(out, labels):
        seen.append(type(out))
        return of_dict(out, labels)

    model = Net(FORMS["dict"]).eval()
    if "max_loss_increase" in options:
        options = {**options, "loss_cap": 3.0}
    result = fastsal.prune(model, data(), loss=loss, block_size=16, **options)
    result.masks.verify(model)
    assert set(seen) == {dict}


def test_gradients_and_statistics(form):
    plain, other = Net().eval(), Net(form).eval()
    images, labels = data()[0]
    expected = fastsal.per_sample_gradients(plain, images, labels)
    assert same(expected, fastsal.per_sample_gradients(other, images, labels))
    for curvature in ("empirical", "sampled", "features"):
        of = [
            fastsal.collect(m, data(), curvature=curvature, block_size=16).diagonal()
            for m in (plain, other)
        ]
        assert same(*of)


def test_a_loss_in_a_narrow_type_gets_wider_tensors():
    seen = []

    def loss(out, labels):
        seen.extend(value.dtype for value in out.values())
        return of_dict(out, labels)

    fastsal.collect(Net(FORMS["dict"]).eval().bfloat16(), data(), loss=loss, block_size=16)
    assert set(seen) == {torch.float32}


def test_fine_tuning_with_held_out_images(form):
    plain, other = Net(), Net(form)
    masks = fastsal.Masks({"conv.weight": torch.arange(108).reshape(4, 3, 3, 3) % 2})
    for model in (plain, other):
        result = fastsal.finetune(model, data(), masks, epochs=2, lr=0.1, held_out=data())
        assert len(result.history) == 2
    assert same(plain.state_dict(), other.state_dict())


def test_fine_tuning_with_a_loss_of_the_user_and_held_out_images():
    model = Net(FORMS["dict"])
    masks = fastsal.Masks({"conv.weight": torch.arange(108).reshape(4, 3, 3, 3) % 2})
    result = fastsal.finetune(model, data(), masks, epochs=1, lr=0.1, held_out=data(), loss=of_dict)
    assert result.before is not None


def test_accuracy_heads_and_features(form):
    plain, other = Net().eval(), Net(form).eval()
    assert measure(plain, data()) == measure(other, data())
    task = fastsal.Task("t", data(), data())
    for kind in ("ridge", "own"):
        heads = [fastsal.fit_heads(model, task, kind=kind) for model in (plain, other)]
        found = [fastsal.evaluate(m, task, h) for m, h in zip((plain, other), heads)]
        assert found[0] == found[1]
        x = data()[0][0]
        headed = [Headed(m, [h["t"]])(x) for m, h in zip((plain, other), heads)]
        assert torch.equal(*headed)


def test_a_model_without_logits_is_described():
    model = Net(lambda out, hidden: {"a": out, "b": hidden}).eval()
    message = r"must return logits \[n, C\] .*got dict with a: tensor \[.*3\], b: tensor .*4\]"
    for call in (
        lambda: fastsal.collect(model, data()),
        lambda: fastsal.prune(model, data(), 0.5),
        lambda: fastsal.finetune(
            model, data(), fastsal.Masks({"fc.bias": torch.ones(3)}), epochs=1, lr=0.1, head="fc"
        ),
    ):
        with pytest.raises(InvalidArgument, match=message):
            call()
    with pytest.raises(InvalidArgument, match=r"must return logits .*got dict with a: tensor"):
        accuracy(model, data())


# -------------------------------------------------------------------------------------- batches

BATCHES = {
    "pixel_values": (lambda x, y: {"pixel_values": x, "labels": y}, None),
    "image": (lambda x, y: {"image": x, "label": y, "id": "a"}, None),
    "x": (lambda x, y: {"x": x, "y": y}, None),
    "three parts": (lambda x, y: ("id", x, y), lambda batch: batch[1:]),
    "object": (lambda x, y: SimpleNamespace(x=x, y=y), lambda batch: (batch.x, batch.y)),
}


@pytest.fixture(params=BATCHES.values(), ids=BATCHES)
def batches(request):
    form, rule = request.param
    return [form(x, y) for x, y in data()], rule


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_pruning_takes_batches_of_other_forms(batches, options):
    others, rule = batches
    plain, other = Net().eval(), Net().eval()
    if "sparsity" not in options:
        options = {**options, "held_out": "replaced"}
        of_pairs, of_others = {**options, "held_out": data()}, {**options, "held_out": others}
    else:
        of_pairs = of_others = options
    expected = fastsal.prune(plain, data(), block_size=16, **of_pairs)
    assert fastsal.prune(other, others, block_size=16, batch=rule, **of_others).masks == (
        expected.masks
    )
    assert same(plain.state_dict(), other.state_dict())


def test_other_functions_take_batches_of_other_forms(batches):
    others, rule = batches
    model = Net().eval()
    expected = fastsal.collect(model, data(), block_size=16).diagonal()
    assert same(expected, fastsal.collect(model, others, block_size=16, batch=rule).diagonal())
    of_one_pass = fastsal.collect(model, iter(others), block_size=16, batch=rule)
    assert same(expected, of_one_pass.diagonal())
    plan = fastsal.plan_memory(model, others, batch=rule, calibrate=False)
    assert plan.statistics == fastsal.plan_memory(model, data(), calibrate=False).statistics
    assert measure(model, others, batch=rule) == measure(model, data())
    task, same_task = (
        fastsal.Task("t", others, others, batch=rule),
        fastsal.Task("t", data(), data()),
    )
    assert fastsal.evaluate(model, task, fastsal.fit_heads(model, task)) == fastsal.evaluate(
        model, same_task, fastsal.fit_heads(model, same_task)
    )


def test_fine_tuning_takes_batches_of_other_forms(batches):
    others, rule = batches
    masks = fastsal.Masks({"conv.weight": torch.arange(108).reshape(4, 3, 3, 3) % 2})
    plain, other = Net(), Net()
    fastsal.finetune(plain, data(), masks, epochs=2, lr=0.1, held_out=data())
    fastsal.finetune(other, others, masks, epochs=2, lr=0.1, held_out=others, batch=rule)
    assert same(plain.state_dict(), other.state_dict())


def test_further_parts_are_ignored_with_features_only():
    triples = [(x, y, y) for x, y in data()]
    plain, other = Net().eval(), Net().eval()
    expected = fastsal.prune(plain, data(), 0.5, curvature="features")
    assert fastsal.prune(other, triples, 0.5, curvature="features").masks == expected.masks
    for curvature in ("empirical", "sampled"):
        with pytest.raises(DataError, match="of length 3: tensor .*pass batch="):
            fastsal.collect(other, triples, curvature=curvature)


def test_an_error_in_a_rule_leaves_the_model_unchanged():
    model = Net().eval()
    with pytest.raises(KeyError):
        fastsal.prune(model, data(), 0.5, batch=lambda batch: {}["x"])
    assert same(model.state_dict(), Net().state_dict())
