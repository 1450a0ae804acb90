"""Modes are changed by flags alone, and come back; layers that merge weights keep theirs."""

from __future__ import annotations

import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastsal
from fastsal.finetuning.freezing import training_only
from fastsal.models.evaluating import evaluating, set_modes
from fastsal.models.inputs import InputSpec
from fastsal.models.weights import save_weights
from fastsal.pruning.recalibration import recalibrate
from fastsal.transfer.evaluation import measure
from fastsal.transfer.headed import Headed

pytestmark = pytest.mark.usefixtures("one_thread")

SPEC = InputSpec(3, None, (0.5,) * 3, (0.5,) * 3)


class Adapter(nn.Linear):
    """A linear layer with an adapter of rank one that is merged in `eval()`, as loralib's are."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.a = nn.Parameter(torch.randn(1, inputs) / 3)
        self.b = nn.Parameter(torch.randn(outputs, 1) / 3)
        self.merged = False
        self.calls = []

    def train(self, mode=True):
        super().train(mode)
        self.calls.append(mode)
        if mode == self.merged:
            sign = -1 if mode else 1
            self.weight.data += sign * (self.b @ self.a)
            self.merged = not mode
        return self

    def forward(self, x):
        out = F.linear(x, self.weight, self.bias)
        return out if self.merged else out + x @ self.a.T @ self.b.T


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.bn = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.adapter = Adapter(4, 6)
        self.fc = nn.Linear(6, 3)

    def forward_features(self, x):
        return F.relu(self.adapter(self.drop(F.relu(self.bn(self.conv(x)))).mean((2, 3))))

    def forward(self, x):
        return self.fc(self.forward_features(x))


def make(merged):
    torch.manual_seed(0)
    model = Net().train(not merged)
    model.drop.training = merged  # modes that differ between layers
    model.adapter.calls.clear()
    return model


def images(n=48):
    rng = np.random.default_rng(0)
    y = np.arange(n) % 3
    x = rng.integers(0, 99, (n, 4, 4, 3))
    x[np.arange(n), :, :, y] += 100
    return fastsal.ImageSet(x.astype(np.uint8), y, ("a", "b", "c"), "array")


def batches():
    return list(images().batches(SPEC, 16))


def modes(model):
    return {name: module.training for name, module in model.named_modules()}


MEASURES = {
    "collect": lambda m: fastsal.collect(m, batches(), block_size=8),
    "per_sample_gradients": lambda m: fastsal.per_sample_gradients(m, *batches()[0]),
    "plan_memory": lambda m: fastsal.plan_memory(m, batches(), block_size=8),
    "score": lambda m: fastsal.score(m, None, "magnitude"),
    "fit_heads": lambda m: fastsal.fit_heads(m, fastsal.Task.split("t", images()), spec=SPEC),
    "evaluate": lambda m: fastsal.evaluate(
        m,
        task := fastsal.Task.split("t", images()),
        fastsal.fit_heads(m, task, spec=SPEC),
    ),
    "own head": lambda m: Headed(
        m, [fastsal.fit_heads(m, fastsal.Task.split("t", images()), kind="own", spec=SPEC)["t"]]
    ),
    "measure": lambda m: measure(m, batches()),
}


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("name", MEASURES)
def test_measuring_changes_neither_weights_nor_modes(name, merged):
    model = make(merged)
    before, flags = {k: v.clone() for k, v in model.state_dict().items()}, modes(model)
    MEASURES[name](model)
    assert all(value.equal(before[k]) for k, value in model.state_dict().items())
    assert modes(model) == flags
    assert model.adapter.merged is merged
    assert model.adapter.calls == []


def finetuned(model):
    masks = fastsal.rank(fastsal.score(model, None, "magnitude"), 0.5)
    fastsal.finetune(model, batches(), masks, epochs=1, lr=0.01, held_out=batches())
    masks.verify(model)


CHANGES = {
    "prune": lambda m: fastsal.prune(
        m, batches(), 0.5, block_size=8, recalibrate=True
    ).masks.verify(m),
    "prune in rounds": lambda m: fastsal.prune(
        m, batches(), 0.5, block_size=8, rounds=2, curvature="features"
    ).masks.verify(m),
    "prune to a limit": lambda m: fastsal.prune(
        m, batches(), block_size=8, max_loss_increase=0.5
    ).masks.verify(m),
    "finetune": finetuned,
    "recalibrate": lambda m: recalibrate(m, batches()),
}


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("name", CHANGES)
def test_pruned_and_trained_weights_are_those_in_use(name, merged):
    model = make(merged)
    flags = modes(model)
    adapter = [p.detach().clone() for p in (model.adapter.a, model.adapter.b)]
    CHANGES[name](model)
    assert modes(model) == flags
    assert model.adapter.merged is merged
    assert model.adapter.calls == []
    if name != "finetune" or merged:  # merged adapters have no gradients
        assert all(map(torch.equal, adapter, (model.adapter.a, model.adapter.b)))


def test_a_loaded_model_is_not_merged_twice(tmp_path):
    code = (
        "import importlib.util, torch\n"
        f"spec = importlib.util.spec_from_file_location('adapters', {__file__!r})\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "def net():\n    return module.Net()\n"
    )
    (tmp_path / "net.py").write_text(code)
    model = fastsal.load_model(f"{tmp_path / 'net.py'}:net", seed=3)
    assert not any(modes(model).values())
    x = batches()[0][0]
    expected = model(x)
    save_weights(model, tmp_path / "saved.safetensors")
    again = fastsal.load_model(f"{tmp_path / 'net.py'}:net", weights=tmp_path / "saved.safetensors")
    assert torch.equal(again(x), expected)


class Cached(nn.Module):
    """Keeps a product of its weights while it is evaluated, as timm's LeViT does."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.ones(4))
        self.head = nn.Linear(4, 3)
        self.bias_cache = {}

    def train(self, mode=True):
        super().train(mode)
        if mode:
            self.bias_cache = {}
        return self

    def forward(self, x):
        x = self.fc(x.mean((2, 3)) if x.dim() == 4 else x)
        if self.training:
            return self.head(x * self.scale)
        if "scale" not in self.bias_cache:
            self.bias_cache["scale"] = self.scale * 1
        return self.head(x * self.bias_cache["scale"])


@pytest.mark.parametrize("mode", [False, True])
def test_values_that_evaluation_keeps_are_those_of_the_weights(mode):
    torch.manual_seed(0)
    model = Cached().train(mode)
    x, y = torch.randn(32, 4), torch.arange(32) % 3
    masks = fastsal.Masks({"fc.weight": torch.ones(4, 4)})
    with torch.no_grad():
        model(x)
    result = fastsal.finetune(
        model, [(x, y)], masks, epochs=2, lr=0.5, held_out=[(x, y)], frozen="fc.*"
    )
    assert result.kept_epoch > 0
    with torch.no_grad():
        fresh = F.linear(model.fc(x) * model.scale, model.head.weight, model.head.bias)
        expected = float(F.cross_entropy(fresh, y))
        with evaluating(model):
            assert torch.equal(model(x), fresh)
    assert result.history[result.kept_epoch - 1]["held_out_loss"] == pytest.approx(expected)


def test_modes_return_after_an_interruption():
    model = make(merged=True)
    flags = modes(model)

    def interrupted(how):
        with how:
            set_modes(model, True)
            raise KeyboardInterrupt

    for how in (
        evaluating(model),
        training_only(model, {"fc.weight": model.fc.weight}, train_normalization=False),
    ):
        with pytest.raises(KeyboardInterrupt):
            interrupted(how)
        assert modes(model) == flags


class Interrupts(nn.Module):
    """Gets Ctrl-C when its flag is set."""

    def __setattr__(self, name, value):
        super().__setattr__(name, value)
        if name == "training" and value and "stops" in vars(self):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_while_modes_return_does_not_mix_them():
    model = nn.Sequential(nn.Linear(2, 2), Interrupts(), nn.Linear(2, 2)).train()
    model[1].stops = True

    def evaluate():
        with evaluating(model):
            assert not any(m.training for m in model.modules())

    with pytest.raises(KeyboardInterrupt):
        evaluate()
    assert all(m.training for m in model.modules())


def test_a_headed_backbone_keeps_its_modes():
    model = make(merged=False)
    model.bn.eval()
    flags = modes(model)
    task = fastsal.Task.split("t", images())
    headed = Headed(model, [fastsal.fit_heads(model, task, spec=SPEC)["t"]])
    assert modes(model) == flags
    assert headed.training is True
    assert headed.linear[0].training is True
