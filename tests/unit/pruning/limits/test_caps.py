"""A limit on the loss needs a cap, and says it; a limit on the accuracy needs classes."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn

import fastsal
from fastsal.cli import main
from fastsal.cli.safety_figure import draw
from fastsal.errors import DataError, InvalidArgument
from fastsal.gradients.losses import cross_entropy
from fastsal.pruning.limits.examination import Examination
from fastsal.pruning.limits.limit import Limit, SafetyReport, summary
from fastsal.pruning.limits.values import capped, is_right
from fastsal.pruning.prune_to_limit import GRID

HOW = {"criterion": "magnitude", "compensate": False}


class Counting(nn.Module):
    """A model that counts its passes."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.images, self.passes = inner, 0, 0

    def forward(self, x):
        self.images, self.passes = self.images + len(x), self.passes + 1
        return self.inner(x)


def regression(n=600):
    """A linear map with large outputs, and the squared error of it."""
    torch.manual_seed(0)
    model = Counting(nn.Linear(8, 2))
    x = torch.randn(n, 8)
    with torch.no_grad():
        model.inner.weight.mul_(20)
        y = model.inner(x) + 0.1 * torch.randn(n, 2)
    return model, [(x[i : i + 50], y[i : i + 50]) for i in range(0, n, 50)]


def squared(outputs, labels):
    return (outputs - labels).square().mean(1)


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(20, 16), nn.Linear(16, 20)

    def forward(self, tokens):
        return self.head(self.embed(tokens))


def token_loss(outputs, labels):
    return nn.functional.cross_entropy(outputs.mT, labels, reduction="none").mean(1)


def tokens(n=200):
    torch.manual_seed(1)
    return [(torch.randint(0, 20, (n, 6)), torch.randint(0, 20, (n, 6)))]


def classifier(n=400, classes=4):
    torch.manual_seed(0)
    model = Counting(nn.Linear(8, classes))
    x = torch.randn(n, 8)
    return model, [(x, model.inner(x).argmax(1) if classes > 1 else torch.zeros(n).long())]


REFUSED = {
    "a squared error without a cap": (
        regression, {"max_loss_increase": 0.8, "loss": squared},
        InvalidArgument, "loss_cap must be given for max_loss_increase with a loss function",
    ),
    "tokens without a cap": (
        lambda: (Tokens(), tokens()), {"max_loss_increase": 0.8, "loss": token_loss},
        InvalidArgument, "loss_cap must be given",
    ),
    "the accuracy of tokens": (
        lambda: (Tokens(), tokens()), {"max_accuracy_drop": 0.1, "loss": token_loss},
        InvalidArgument, r"max_accuracy_drop must be None unless .*\[n, C\].*got \[2, 6, 20\]",
    ),
    "the cross-entropy of tokens": (
        lambda: (Tokens(), tokens()), {"max_loss_increase": 0.1},
        InvalidArgument, r"model must return logits \[2, C\] for max_loss_increase",
    ),
    "the accuracy of a regression": (
        regression, {"max_accuracy_drop": 0.1, "loss": squared},
        DataError, "labels must be integers",
    ),
    "the accuracy of one output": (
        lambda: classifier(classes=1), {"max_accuracy_drop": 0.1},
        InvalidArgument, r"two or more classes, got \[2, 1\]",
    ),
    "labels of other classes": (
        lambda: (classifier()[0], [(torch.randn(40, 8), torch.full((40,), 7))]),
        {"max_accuracy_drop": 0.1}, DataError, r"labels must be in \[0, 3\]",
    ),
    "a limit that no model exceeds": (
        classifier, {"max_loss_increase": 1.5},
        InvalidArgument, "max_loss_increase must be less than 1.38629, the cap .*got 1.5",
    ),
    "a limit above its cap": (
        regression, {"max_loss_increase": 5.0, "loss": squared, "loss_cap": 5.0},
        InvalidArgument, "max_loss_increase must be less than 5, the cap",
    ),
    "a cap that is none": (
        regression, {"max_loss_increase": 0.5, "loss": squared, "loss_cap": math.inf},
        InvalidArgument, "loss_cap must be positive, got inf",
    ),
    "a cap for nothing": (
        classifier, {"max_accuracy_drop": 0.5, "loss_cap": 1.0},
        InvalidArgument, "loss_cap must be None without max_loss_increase, got 1.0",
    ),
    "a loss below zero": (
        regression,
        {"max_loss_increase": 0.5, "loss": lambda out, y: squared(out, y) - 9, "loss_cap": 10.0},
        InvalidArgument, "loss must be at least 0 with max_loss_increase, got -",
    ),
    "one loss for a batch": (
        regression,
        {"max_loss_increase": 0.5, "loss": lambda out, y: squared(out, y).mean(), "loss_cap": 9.0},
        InvalidArgument, r"loss must return one loss per sample, \[2\]",
    ),
    "a loss that is NaN": (
        regression,
        {"max_loss_increase": 0.5, "loss": lambda out, y: squared(out, y) * math.nan,
         "loss_cap": 9.0},
        DataError, "loss of the dense model must be finite",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("more", [HOW, {"damping": 1e-3}], ids=["no statistics", "statistics"])
def test_what_has_no_guarantee_is_refused_before_any_pass(case, more):
    make, given, error, message = REFUSED[case]
    model, batches = make()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        fastsal.prune(model, batches, **given, **more)
    assert getattr(model, "images", 0) <= 2  # two images tell what the outputs are
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())


def test_the_increase_of_a_squared_error_is_that_of_the_capped_one():
    """By hand on the test images; without a cap, a rise by 109 was said to be at most 0.8."""
    model, batches = regression()
    dense = copy.deepcopy(model)
    cap, most = 25.0, 2.0
    how = {"loss": squared, "max_loss_increase": most, "loss_cap": cap, "held_out": batches}
    safety = fastsal.prune(model, None, **how, **HOW).safety
    assert safety.capped_at == safety.limit.cap == cap
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    scores = fastsal.score(dense, None, "magnitude")
    for point in safety.curve:
        pruned = copy.deepcopy(dense)
        fastsal.rank(scores, point["sparsity"]).apply(pruned)
        with torch.no_grad():
            losses = [squared(m(x), y).double() for m in (dense, pruned)]
        want = losses[1].clamp(max=cap).mean() - losses[0].clamp(max=cap).mean()
        assert point["increase"] == pytest.approx(float(want), abs=1e-5)
        assert point["loss_increase"] == pytest.approx(float(losses[1].mean() - losses[0].mean()))
    assert [p["keeps"] for p in safety.curve] != [True] * len(GRID)
    assert max(p["loss_increase"] for p in safety.curve) > most


def test_tokens_have_a_limit_with_a_cap():
    model = Tokens()
    how = {"loss": token_loss, "max_loss_increase": 0.3, "loss_cap": 6.0, "confidence": 0.6}
    safety = fastsal.prune(model, tokens(400), **how, **HOW).safety
    assert safety.capped_at == 6.0
    assert safety.images == 100


def test_the_cap_of_the_cross_entropy_is_that_of_guessing_or_as_given():
    for given, cap in (({}, math.log(4)), ({"loss_cap": 5.0}, 5.0)):
        model, batches = classifier()
        safety = fastsal.prune(model, batches, max_loss_increase=0.3, **given, **HOW).safety
        assert safety.capped_at == pytest.approx(cap)


def test_what_is_not_a_number_counts_as_the_worst():
    losses = torch.tensor([0.5, 3.0, math.nan, math.inf, -1.0])
    assert capped(losses, 2.0).tolist() == [0.5, 2.0, 2.0, 2.0, 0.0]
    outputs = torch.tensor([[0.0, 1.0], [math.nan, math.nan], [2.0, 1.0]])
    assert is_right(outputs, torch.tensor([1, 0, 1])).tolist() == [True, False, False]


def test_a_model_of_nans_is_not_within_an_accuracy_limit():
    """NaN is the largest of NaN outputs: class 0, which was right for every label 0."""

    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 4)

        def forward(self, x):
            lost = (self.fc.weight == 0).any()
            return torch.where(lost, torch.nan, 1.0) * torch.eye(4)[0].expand(len(x), 4) + (
                0 * self.fc(x)
            )

    batches = [(torch.randn(300, 8), torch.zeros(300).long())]
    safety = fastsal.prune(Broken(), batches, max_accuracy_drop=0.1, **HOW).safety
    assert safety.sparsity == 0
    assert safety.curve[0]["increase"] == 1.0


@pytest.mark.parametrize("sparsity", [0.5, 0.0])
def test_every_sentence_about_a_loss_says_its_cap(sparsity, tmp_path):
    limit = Limit("loss", 0.1, 0.9, 2.5)
    report = SafetyReport(limit, sparsity, 300, 2.5, [])
    for text in (summary(report), repr(report)):
        assert "capped at 2.5" in text
    assert report.as_dict()["limit"]["capped_at"] == report.as_dict()["capped_at"] == 2.5
    other = SafetyReport(Limit("accuracy", 0.1), sparsity, 300, None, [])
    assert "capped" not in summary(other) + repr(other)
    pytest.importorskip("matplotlib")
    point = {
        "sparsity": 0.1, "predicted": None, "increase": 0.1, "upper": 0.2, "keeps": True,
        "loss_increase": 0.1, "loss_error": 0.1,
    }  # fmt: skip
    report.curve.append(point)
    draw(report, tmp_path / "curve.svg")
    assert "capped at 2.5" in (tmp_path / "curve.svg").read_text()


def test_the_command_has_the_cap(tmp_path, tiny_file, tiny_npz):
    run = tmp_path / "run"
    arguments = [
        *("prune", f"{tiny_file}:tiny", "--data", f"{tiny_npz}", "--max-loss-increase", "0.5"),
        *("--loss-cap", "3", "--criterion", "magnitude", "--no-compensate", "--out", f"{run}"),
    ]
    done = CliRunner().invoke(main, arguments, env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    assert "capped at 3" in done.output
    report = json.loads((run / "report.json").read_text())
    assert report["safety"]["capped_at"] == 3.0
    assert report["safety"]["limit"]["capped_at"] == 3.0
    assert isinstance(report["safety"]["seed"], int)


def test_the_grid_is_plain_numbers():
    assert [type(sparsity) for sparsity in GRID] == [float] * 26
    steps = (*np.arange(0.1, 0.5, 0.1), *np.arange(0.5, 0.96, 0.025), 0.97, 0.98, 0.99)
    assert tuple(round(float(sparsity), 3) for sparsity in steps) == GRID
    model, batches = classifier()
    safety = fastsal.prune(model, batches, max_accuracy_drop=0.5, **HOW).safety
    assert {type(point["sparsity"]) for point in safety.curve} == {float}
    assert type(safety.sparsity) is float


def test_only_what_is_measured_of_the_dense_model_is_kept():
    """Two numbers an image, not its pixels and the outputs for all classes."""
    model, batches = classifier(classes=500)
    examination = Examination(model, batches, Limit("accuracy", 0.1), cross_entropy)
    kept = [values.limited.nbytes + values.losses.nbytes for values in examination.dense]
    assert sum(kept) <= 16 * examination.images == 16 * 400
    passes = model.passes
    assert examination(model)["increase"] == 0
    assert model.passes - passes == len(list(batches))
