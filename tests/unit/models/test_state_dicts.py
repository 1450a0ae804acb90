"""Files that training writes: which state dict is loaded, and under which names."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from timm.utils import CheckpointSaver, ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel

from fastsal.errors import FileFormatError, InvalidArgument
from fastsal.models.loading import load_model
from fastsal.models.weights import load_weights, read_weights


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 3))


def loaded(path, **options):
    model = net(9)
    load_weights(model, path, **options)
    return model


def is_net(model, seed):
    return all(torch.equal(model.state_dict()[n], v) for n, v in net(seed).state_dict().items())


@pytest.fixture
def saved(tmp_path):
    def save(content, name="w.pth"):
        torch.save(content, tmp_path / name)
        return tmp_path / name

    return save


@pytest.mark.parametrize("average", [True, False])
def test_what_the_training_script_of_timm_writes(tmp_path, average):
    """`timm.utils.CheckpointSaver` as `train.py` calls it: arguments, optimizer, metric."""
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=3)
    ema = ModelEmaV3(model, decay=0.5) if average else None
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=np.float64(0.1), momentum=0.9)
    args = argparse.Namespace(model="test_resnet", lr=0.1, mean=(0.5,), ratio=np.float32(0.75))
    saver = CheckpointSaver(
        model, optimizer, args=args, model_ema=ema, checkpoint_dir=str(tmp_path),
        recovery_dir=str(tmp_path),
    )  # fmt: skip
    saver.save_checkpoint(0, metric=np.float64(71.5))
    path = tmp_path / "model_best.pth.tar"
    expected = (ema.module if average else model).state_dict()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = load_model("test_resnet", weights=path, num_classes=3).state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    notes = [str(each.message) for each in told]
    assert len(notes) == int(average)
    if average:
        assert notes[0].endswith(
            "the average 'state_dict_ema' is loaded, not 'state_dict'; weights_key chooses another"
        )
        plain = load_model("test_resnet", weights=path, num_classes=3, weights_key="state_dict")
        assert torch.equal(plain.state_dict()["fc.weight"], model.state_dict()["fc.weight"])


@pytest.mark.parametrize(
    "number",
    [
        np.float64(1), np.float32(1), np.int64(1), np.bool_(True), np.str_("a"), np.arange(3),
        np.array([["a"]]), argparse.Namespace(lr=1.0, inner=argparse.Namespace(size=(3, 4))),
        Path("data") / "train",
    ],
    ids=repr,
)  # fmt: skip
@pytest.mark.parametrize("zipped", [True, False])
def test_plain_objects_beside_the_weights(tmp_path, number, zipped):
    before = set(torch.serialization.get_safe_globals())
    torch.save(
        {"state_dict": net(1).state_dict(), "args": number, "metric": {"top1": [number]}},
        tmp_path / "w.ckpt",
        _use_new_zipfile_serialization=zipped,
    )
    assert is_net(loaded(tmp_path / "w.ckpt"), 1)
    assert set(torch.serialization.get_safe_globals()) == before  # PyTorch keeps a set


def test_what_the_user_has_allowed_stays_allowed(saved):
    path = saved({"state_dict": net(1).state_dict(), "args": argparse.Namespace(a=1)})
    with torch.serialization.safe_globals([argparse.Namespace]):
        loaded(path)
        assert argparse.Namespace in torch.serialization.get_safe_globals()


@pytest.mark.parametrize("name", ["w.pth", "w.pt", "w.pth.tar", "w.ckpt", "w.bin"])
@pytest.mark.parametrize(
    "nest",
    [
        lambda s: s,
        lambda s: {"state_dict": s, "epoch": 3},
        lambda s: {"model": s, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}},
        lambda s: {"model_state_dict": s, "loss": 0.1},
        lambda s: {"net": s, "acc": 91.2, "epoch": 7},
        lambda s: {"backbone of mine": s, "epoch": 3},
        lambda s: {"model": {"state_dict": s}},
        lambda s: {"model": s, "optimizer_state": {"momentum": torch.ones(2)}},
        lambda s: {"state_dict": s, "state_dict_ema": None, "ema_decay": torch.tensor(0.9)},
        lambda s: {"state_dict": s, "callbacks": {"ema_of_loss": {"value": torch.ones(1)}}},
    ],
)
@pytest.mark.filterwarnings("error")
def test_forms_of_files(saved, name, nest):
    assert is_net(loaded(saved(nest(net(1).state_dict()), name)), 1)


@pytest.mark.parametrize(
    "key",
    ["state_dict_ema", "model_ema", "ema_state_dict", "ema", "swa_state_dict", "model_swa",
     "averaged_model", "average_model"],
)  # fmt: skip
def test_averages_are_loaded_and_told(saved, key):
    path = saved({"state_dict": net(1).state_dict(), key: net(2).state_dict()})
    with pytest.warns(UserWarning, match=f"the average '{key}' is loaded, not 'state_dict'"):
        assert is_net(loaded(path), 2)
    assert is_net(loaded(path, weights_key="state_dict"), 1)
    assert is_net(loaded(path, weights_key=key), 2)
    with pytest.warns(UserWarning, match=f"the average '{key}' is loaded"):
        assert torch.equal(read_weights(path)["3.weight"], net(2)[3].weight)


def test_an_average_in_the_form_of_pytorch(saved):
    """As the reference scripts of torchvision save it: `module.` and a counter."""
    average = AveragedModel(net(2)).state_dict()
    assert "n_averaged" in average
    path = saved({"model": net(1).state_dict(), "model_ema": average})
    with pytest.warns(UserWarning, match="the average 'model_ema' is loaded, not 'model'"):
        assert is_net(loaded(path), 2)
    assert is_net(loaded(saved(average)), 2)


@pytest.mark.parametrize("prefix", ["model.", "net.", "module.model.", "model._orig_mod."])
def test_a_lightning_module(saved, prefix):
    state = {prefix + name: value for name, value in net(1).state_dict().items()}
    content = {
        "state_dict": state,
        "hyper_parameters": {"lr": 0.1},
        "pytorch-lightning_version": "2",
    }
    assert is_net(loaded(saved(content, "w.ckpt")), 1)
    state["criterion.weight"] = torch.ones(3)
    with pytest.warns(UserWarning, match=r"are loaded, the others are not \(criterion.weight\)"):
        assert is_net(loaded(saved(content, "w.ckpt")), 1)


def test_an_average_beside_the_weights_in_a_lightning_module(saved):
    state = {f"model.{name}": value for name, value in net(1).state_dict().items()}
    state |= {f"ema_model.{name}": value for name, value in net(2).state_dict().items()}
    path = saved({"state_dict": state}, "w.ckpt")
    with pytest.warns(UserWarning, match="under 'ema_model.' are loaded, the others are not"):
        assert is_net(loaded(path), 2)
    torch.save(state, path)
    assert is_net(loaded(path, weights_key="model"), 1)


def test_nested_keys(saved):
    path = saved({"a": {"b": net(1).state_dict(), "c": net(2).state_dict()}})
    assert is_net(loaded(path, weights_key="a.b"), 1)
    assert is_net(loaded(path, weights_key="a.c"), 2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"student": 1, "teacher": 2}, "several state dicts; weights_key must be one of student, "
         "teacher"),
        ({"model": 1, "model_ema": 2, "swa": 3}, None),  # timm's choice
        ({"model": 1, "ema": 2, "swa": 3}, "several state dicts; weights_key must be one of ema, "
         "model, swa"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:weights")
def test_several_state_dicts(saved, content, message):
    path = saved({key: net(seed).state_dict() for key, seed in content.items()})
    if message is None:
        assert is_net(loaded(path), 2)
    else:
        with pytest.raises(FileFormatError, match=message):
            loaded(path)
    for key, seed in content.items():
        assert is_net(loaded(path, weights_key=key), seed)


def test_several_sets_of_weights_in_one_state_dict(saved):
    state = {f"a.{name}": value for name, value in net(1).state_dict().items()}
    state |= {f"b.{name}": value for name, value in net(2).state_dict().items()}
    path = saved(state)
    with pytest.raises(
        FileFormatError, match="several sets of weights; weights_key must be .* a, b"
    ):
        loaded(path)
    assert is_net(loaded(path, weights_key="b"), 2)


@pytest.mark.parametrize(
    ("content", "key", "message"),
    [
        ({"state_dict": 1}, "state_dit", "weights_key must be one of state_dict for .*got "
         "'state_dit'; did you mean 'state_dict'"),
        (1, "state_dict", "weights_key must be one of 0, 1, 3 for .*, got 'state_dict'"),
        ({"state_dict": 1}, "", "weights_key must be one of state_dict"),
    ],
)  # fmt: skip
def test_an_unknown_key_is_told(saved, content, key, message):
    is_nested = isinstance(content, dict)
    state = (
        {k: net(s).state_dict() for k, s in content.items()} if is_nested else net().state_dict()
    )
    with pytest.raises(InvalidArgument, match=message):
        loaded(saved(state), weights_key=key)


def test_a_key_without_a_file(tiny_file):
    with pytest.raises(InvalidArgument, match="weights_key must be None without a weights file"):
        load_model(f"{tiny_file}:tiny", weights_key="model")


def test_the_keys_of_a_file_without_weights_are_told(saved):
    with pytest.raises(FileFormatError, match=r"no state dict: .*\(its keys are epoch, lr\)"):
        loaded(saved({"epoch": 3, "lr": 0.1}))


def test_a_choice_that_does_not_fit_is_told(saved):
    path = saved({"state_dict": net(1).state_dict(), "state_dict_ema": {"3.weight": torch.ones(3)}})
    model = net(5)
    with pytest.raises(FileFormatError, match="7 missing.*the average 'state_dict_ema' is loaded"):
        load_weights(model, path)
    assert is_net(model, 5)


def test_a_name_with_and_without_a_prefix_is_refused(saved):
    state = {f"module.{name}": value for name, value in net(1).state_dict().items()}
    state["3.weight"] = net(2)[3].weight.detach()
    with pytest.raises(FileFormatError, match=r"contains '3.weight' twice, with and without"):
        loaded(saved(state))


def test_a_name_that_neither_has_is_unexpected(saved):
    for extra in ("head.weight", "module.head.weight"):
        state = {**net(1).state_dict(), extra: torch.ones(2)}
        with pytest.raises(FileFormatError, match=f"1 unexpected: {extra}"):
            loaded(saved(state))
