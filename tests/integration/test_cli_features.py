"""Commands with `--curvature features`: images alone, and models without a classifier."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from .commands import failed, run


@pytest.fixture
def flat(tiny_npz, tmp_path):
    """A folder of images without classes."""
    path = tmp_path / "flat"
    path.mkdir()
    with np.load(tiny_npz) as data:
        for i, x in enumerate(data["x"]):
            Image.fromarray(x).save(path / f"{i:02}.png")
    return path


def test_prune_with_images_alone(tiny_file, flat, tmp_path, tiny_npz):
    out = tmp_path / "run"
    result = run(
        "prune", f"{tiny_file}:tiny", "--data", flat, "--curvature", "features", "--sparsity", 0.5,
        "--test", tiny_npz, "--quiet", "--json", "--out", out,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    report = json.loads((out / "report.json").read_text())
    assert set(report["parameters"]) == {"conv.weight"}
    assert report["samples"] == 60
    assert report["history"][0]["damping"] > 0
    assert set(report["accuracy"]) == {"before", "after"}


def test_features_are_the_default_without_labels(tiny_file, flat, tmp_path, tiny_npz):
    with np.load(tiny_npz) as data:
        np.savez(tmp_path / "images.npz", x=data["x"])
    scores = {}
    for name, data in (("folder", flat), ("file", tmp_path / "images.npz")):
        result = run(
            "score", f"{tiny_file}:tiny", "--data", data, "--quiet", "--out", tmp_path / name
        )
        assert result.exit_code == 0, result.output
        assert f"note: the images of {data} have no labels" in result.output
        scores[name] = load_file(tmp_path / name)["conv.weight"]
    asked = run(
        "score", f"{tiny_file}:tiny", "--data", flat, "--curvature", "features", "--quiet",
        "--out", tmp_path / "asked",
    )  # fmt: skip
    assert "no labels" not in asked.output
    assert scores["folder"].equal(load_file(tmp_path / "asked")["conv.weight"])
    labeled = run(
        "score", f"{tiny_file}:tiny", "--data", tiny_npz, "--quiet", "--out", tmp_path / "l"
    )
    assert "no labels" not in labeled.output
    assert not load_file(tmp_path / "l")["conv.weight"].equal(scores["folder"])


def test_score_with_labels_of_other_classes(tiny_file, tiny_npz, tmp_path):
    with np.load(tiny_npz) as data:
        np.savez(tmp_path / "other.npz", x=data["x"], y=data["y"] + 40)
    given = ("score", f"{tiny_file}:tiny", "--data", tmp_path / "other.npz", "--quiet")
    result = run(*given, "--curvature", "features", "--out", tmp_path / "scores.safetensors")
    assert result.exit_code == 0, result.output
    assert set(load_file(tmp_path / "scores.safetensors")) == {"conv.weight"}
    failed(
        run(*given, "--out", tmp_path / "no"), "must be in 0 to 2 for a model of 3 classes, got 42"
    )


def test_a_limit_needs_labels(tiny_file, flat, tmp_path):
    result = run(
        "prune", f"{tiny_file}:tiny", "--data", flat, "--curvature", "features",
        "--max-accuracy-drop", 0.1, "--quiet", "--out", tmp_path / "run",
    )  # fmt: skip
    failed(result, "must contain one folder of images per class, got no folder")
