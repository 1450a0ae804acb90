from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fastsal.errors import FastsalError, FileFormatError, InvalidArgument
from fastsal.gradients import select_parameters
from fastsal.models.classifier import class_count
from fastsal.models.inputs import IMAGENET_MEAN, input_spec
from fastsal.models.loading import load_model
from fastsal.models.weights import load_weights, read_weights, save_weights


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4, bias=False)
        self.b = nn.Linear(4, 4, bias=False)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(self.a(x))


def test_timm_weights_are_seeded_and_leave_the_global_state():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = load_model("test_resnet", num_classes=4, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    again = load_model("test_resnet", num_classes=4, seed=1)
    other = load_model("test_resnet", num_classes=4, seed=2)
    name = "conv1.0.weight"
    assert torch.equal(first.state_dict()[name], again.state_dict()[name])
    assert not torch.equal(first.state_dict()[name], other.state_dict()[name])
    assert class_count(first) == 4
    assert not first.training


def test_an_unknown_timm_name_lists_close_ones():
    with pytest.raises(InvalidArgument, match=r"got 'resnet1b'; did you mean 'resnet1"):
        load_model("resnet1b")


@pytest.mark.parametrize(
    ("function", "weights", "linear"),
    [("gpt_125m", 124_439_808, 84_934_656), ("gpt_1b", 1_011_476_480, 905_969_664)],
)
def test_the_example_decoders_are_built_without_memory(function, weights, linear):
    example = Path(__file__).resolve().parents[3] / "examples" / "transformer.py"
    with torch.device("meta"):
        model = load_model(f"{example}:{function}")
        logits = model(torch.zeros(2, 64, dtype=torch.long))
    assert logits.shape == (2, 64, 50_257)
    assert sum(p.numel() for p in model.parameters()) == weights
    assert sum(p.numel() for p in select_parameters(model, "!wte.weight").values()) == linear


def test_a_model_from_a_file(tiny_file):
    model = load_model(f"{tiny_file}:tiny", num_classes=5)
    assert class_count(model) == 5
    assert input_spec(model).size is None
    assert input_spec(model).mean == IMAGENET_MEAN


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        ("tyni", {}, "no function 'tyni', only .*tiny"),
        ("", {}, "without a function"),
        ("number", {}, "must return a torch.nn.Module, got int"),
        ("rigid", {"num_classes": 4}, "num_classes must be None for .*rigid.*got 4"),
        ("tiny", {"in_chans": 1}, "in_chans must be None for .*arguments are num_classes, got 1"),
        ("tiny", {"num_classes": -1}, "num_classes must be at least 0, got -1"),
        (
            "tiny",
            {"weights": "pretrained"},
            "weights must be a path for a model from a file, got 'pretrained'",
        ),
        ("tiny", {"weights": "nowhere.pth"}, "no file nowhere.pth"),
        (
            "tiny",
            {"weights": "weights.h5"},
            "weights must be 'pretrained' or a file that ends in .*, got 'weights.h5'",
        ),
    ],
)
def test_bad_arguments_are_named(tiny_file, function, arguments, message):
    with pytest.raises(InvalidArgument, match=message):
        load_model(f"{tiny_file}:{function}", **arguments)


def test_a_missing_model_file_is_named():
    with pytest.raises(InvalidArgument, match=r"no file nowhere\.py"):
        load_model("nowhere.py:tiny")


def test_errors_of_the_users_file_pass(tmp_path):
    (tmp_path / "broken.py").write_text("1 / 0")
    with pytest.raises(ZeroDivisionError):
        load_model(f"{tmp_path / 'broken.py'}:tiny")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt"])
@pytest.mark.parametrize("nest", [None, "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_weights_come_back(tiny_file, tmp_path, suffix, nest, prefix):
    model = load_model(f"{tiny_file}:tiny", seed=5)
    state = {prefix + k: v for k, v in model.state_dict().items()}
    path = tmp_path / f"w{suffix}"
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({nest: state, "epoch": 3} if nest else state, path)
    loaded = load_model(f"{tiny_file}:tiny", weights=path, seed=6)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("fc.weight"), "1 missing: fc.weight"),
        (lambda s: s.update({"fc.weigth": s.pop("fc.weight")}), "similar: fc.weigth"),
        (lambda s: s.update(extra=torch.zeros(2)), "1 unexpected: extra"),
        (
            lambda s: s.update({"conv.weight": torch.zeros(8, 3, 5, 5)}),
            r"1 of a different shape: conv.weight \[8, 3, 5, 5\]",
        ),
        (
            lambda s: s.update({"fc.bias": torch.zeros(3, dtype=torch.int8)}),
            "1 of a different type",
        ),
        (lambda s: s["fc.bias"].fill_(float("nan")), "NaN or infinity in 'fc.bias'"),
        (lambda s: s.update({f"e{i}": torch.zeros(1) for i in range(9)}), "9 unexpected.*4 more"),
    ],
)
def test_weights_that_do_not_fit_change_nothing(tiny_file, tmp_path, change, message):
    model = load_model(f"{tiny_file}:tiny")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = {k: v.clone() + 1 for k, v in model.state_dict().items()}
    change(state)
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(FileFormatError, match=message):
        load_weights(model, tmp_path / "w.safetensors")
    for name, value in model.state_dict().items():
        assert torch.equal(before[name], value)


def test_another_number_of_classes_gets_a_hint(tiny_file, tmp_path):
    save_weights(load_model(f"{tiny_file}:tiny", num_classes=7), tmp_path / "w.safetensors")
    with pytest.raises(
        FileFormatError, match="classifier in the file has 7 classes: pass num_classes=7"
    ):
        load_model(f"{tiny_file}:tiny", weights=tmp_path / "w.safetensors")


def test_another_number_of_channels_gets_none(tmp_path):
    save_weights(nn.Sequential(nn.Conv2d(3, 9, 3)), tmp_path / "w.safetensors")
    with pytest.raises(FileFormatError, match=r"\[8, 3, 3, 3\]") as caught:
        load_weights(nn.Sequential(nn.Conv2d(3, 8, 3)), tmp_path / "w.safetensors")
    assert "num_classes" not in str(caught.value)


def test_old_files_without_batch_counters_load(tiny_file, tmp_path):
    state = load_model(f"{tiny_file}:tiny", seed=3).state_dict()
    del state["bn.num_batches_tracked"]
    save_file(state, tmp_path / "w.safetensors")
    load_model(f"{tiny_file}:tiny", weights=tmp_path / "w.safetensors")


def test_files_with_code_are_refused(tmp_path):
    torch.save({"state_dict": nn.Linear(2, 2)}, tmp_path / "w.pth")
    with pytest.raises(FileFormatError, match="cannot be read as plain tensors"):
        read_weights(tmp_path / "w.pth")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_truncated_weights_are_refused(tiny_file, tmp_path, suffix):
    path = tmp_path / f"w{suffix}"
    state = load_model(f"{tiny_file}:tiny").state_dict()
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(FileFormatError, match=r"w\."):
        read_weights(path)


@pytest.mark.parametrize("content", [{}, {"a": 1}, [1, 2], {"optimizer": {"lr": 1.0}}])
def test_files_without_a_state_dict_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(FileFormatError, match="no state dict"):
        read_weights(tmp_path / "w.pth")


def test_shared_tensors_are_written_once_and_come_back(tmp_path):
    model, other = Tied(), Tied()
    save_weights(model, tmp_path / "w.safetensors")
    assert len(read_weights(tmp_path / "w.safetensors")) == 1
    load_weights(other, tmp_path / "w.safetensors")
    assert torch.equal(other.b.weight, model.a.weight)
    assert other.b.weight is other.a.weight


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "w.safetensors"
    save_weights(nn.Linear(2, 2), path)
    before = path.read_bytes()

    def half(tensors, filename, metadata):
        with open(filename, "w") as file:
            file.write("half")
        raise KeyboardInterrupt

    monkeypatch.setattr("safetensors.torch.save_file", half)
    with pytest.raises(KeyboardInterrupt):
        save_weights(nn.Linear(2, 2), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


def test_an_unreachable_hub_is_told(monkeypatch):
    def fail(*args, **kwargs):
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr("timm.create_model", fail)
    with pytest.raises(
        FastsalError, match=r"pretrained weights of 'resnet18' cannot be downloaded"
    ):
        load_model("resnet18", weights="pretrained")


def test_input_of_timm_models():
    spec = input_spec(load_model("tf_efficientnet_lite0"))
    assert (spec.channels, spec.size, spec.mean) == (3, (224, 224), (0.5, 0.5, 0.5))
    grey = load_model("test_resnet", in_chans=1)
    assert input_spec(grey).channels == 1
    assert len(input_spec(grey).mean) == 1
    assert input_spec(grey, size="native").size is None
    assert input_spec(grey, size=(64, 96)).size == (64, 96)


def test_a_model_of_one_size_says_so():
    with pytest.raises(InvalidArgument, match="size must be 224x224 for this model, got 64x64"):
        input_spec(load_model("vit_tiny_patch16_224"), size=64)
    assert input_spec(load_model("test_vit"), size=64).size == (64, 64)


def test_input_spec_has_the_crop_of_timm():
    model = load_model("resnet50.a1_in1k")
    spec = input_spec(model)
    assert (spec.size, spec.crop_pct, spec.crop_mode) == ((224, 224), 0.95, "center")
    assert input_spec(model, size="train") == spec
    tested = input_spec(model, size="test")
    assert (tested.size, tested.crop_pct) == ((288, 288), 1.0)
    assert not spec.crop_arrays
    squashed = input_spec(model, crop_mode="squash", interpolation="lanczos")
    assert (squashed.crop_pct, squashed.crop_mode) == (0.95, "squash")
    assert squashed.interpolation == "lanczos"
    assert squashed.crop_arrays
    fixed = load_model("vit_tiny_patch16_224")
    assert input_spec(fixed, size="test").size == (224, 224)


def test_models_of_files_have_no_crop_unless_it_is_given(tiny_file):
    model = load_model(f"{tiny_file}:tiny")
    assert input_spec(model, size="test").size is None
    assert input_spec(model, size=8).crop_pct is None
    assert input_spec(model, size=8, crop_mode="border").crop_pct == 0.875  # timm's default
    with pytest.raises(InvalidArgument, match="crop_pct must be None without a size"):
        input_spec(model, crop_pct=0.9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0}, "size must be pixels, .*, got 0"),
        ({"size": 8, "crop_pct": 0}, "crop_pct must be in .*, got 0"),
        ({"size": 8, "crop_pct": 1.5}, "crop_pct must be in .*, got 1.5"),
        ({"size": 8, "crop_mode": "pad"}, "crop_mode must be one of center, squash, border, got"),
        ({"interpolation": "cubic"}, "interpolation must be one of bicubic, .*, got 'cubic'"),
        ({"size": (1, 2, 3)}, "size must be pixels, .*, got .1, 2, 3"),
        ({"mean": [0.1, 0.2]}, "mean must have 1 value or one per channel .3., got 2"),
        ({"std": 0.0}, "std must be positive, got 0.0"),
        ({"channels": 4}, "mean must be given: the model has 4 channels"),
    ],
)
def test_bad_input_settings_are_named(tiny_file, arguments, message):
    with pytest.raises(InvalidArgument, match=message):
        input_spec(load_model(f"{tiny_file}:tiny"), **arguments)


def test_class_count_where_it_cannot_be_known():
    assert class_count(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())) is None
    assert class_count(load_model("test_resnet", num_classes=3)) == 3
    assert class_count(nn.Sequential(nn.Flatten(), nn.Linear(4, 2))) == 2


def test_the_published_resnet20_loads(resnet20_spec, shared_data):
    model = load_model(resnet20_spec, weights=shared_data / "resnet20_cifar10.safetensors")
    assert class_count(model) == 10


NUMBERS = [np.int64, np.int32, torch.tensor]


@pytest.mark.parametrize("number", NUMBERS)
def test_numpy_and_torch_scalars_are_numbers(tiny_file, number):
    model = load_model(f"{tiny_file}:tiny", num_classes=number(5), seed=number(3))
    assert class_count(model) == 5
    same = load_model(f"{tiny_file}:tiny", num_classes=5, seed=3)
    assert torch.equal(model.fc.weight, same.fc.weight)
    spec = input_spec(model, channels=number(3), size=number(8), mean=number(0), std=number(1))
    assert spec == input_spec(model, channels=3, size=8, mean=0.0, std=1.0)
    assert type(spec.size[0]) is int
    assert type(spec.mean[0]) is float


@pytest.mark.parametrize("values", [np.array, torch.tensor])
def test_arrays_are_values_per_channel(tiny_file, values):
    model = load_model(f"{tiny_file}:tiny")
    spec = input_spec(model, size=values([8, 9]), mean=values([0.5, 0.25, 0.5]), std=values([0.5]))
    assert spec == input_spec(model, size=(8, 9), mean=(0.5, 0.25, 0.5), std=0.5)


@pytest.mark.parametrize(
    ("name", "value"), [("num_classes", True), ("in_chans", 3.0), ("seed", "3"), ("seed", True)]
)
def test_what_is_no_integer_is_refused(tiny_file, name, value):
    with pytest.raises(InvalidArgument, match=f"{name} must be an integer, got"):
        load_model(f"{tiny_file}:tiny", **{name: value})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": True}, "channels must be an integer, got True"),
        ({"size": True}, "size must be pixels"),
        ({"size": (8, 8.5)}, "size must be pixels"),
        ({"size": "8"}, "size must be pixels"),
        ({"mean": True}, "mean must be a number, got True"),
        ({"std": (1.0, "1", 1.0)}, "std must be a number, got '1'"),
        ({"std": float("nan")}, "std must be finite, got nan"),
    ],
)
def test_input_numbers_of_another_type_are_refused(tiny_file, arguments, message):
    with pytest.raises(InvalidArgument, match=message):
        input_spec(load_model(f"{tiny_file}:tiny"), **arguments)


def test_threads_build_the_same_weights_and_leave_the_random_numbers():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    with ThreadPoolExecutor(4) as pool:
        models = list(pool.map(lambda _: load_model("test_resnet", seed=1), range(16)))
    first = models[0].state_dict()
    for model in models:
        assert all(torch.equal(v, first[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.rand(4), expected)
