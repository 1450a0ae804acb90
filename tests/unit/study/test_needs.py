"""What a study needs is told without running it, also where its images are missing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fastsal.data.imagenet_tasks import IMAGENET_TASKS
from fastsal.study import load_study, run_study
from fastsal.study.calibration import estimate
from fastsal.study.needs import missing_data, missing_weights, needs_of

ROOT = Path(__file__).resolve().parents[3]
STUDY = """
name = "tiny"
sparsities = [0.5, 0.75]
samples = 8
block_size = 16

[[models]]
name = "tiny"
model = "tiny.py:tiny"

[[tasks]]
name = "all"
data = "tiny.npz"
test_images = 9

[[tasks]]
name = "two"
data = "tiny.npz"
classes = ["red", "blue"]

[[sources]]
tasks = "two"

[[criteria]]
criterion = "obs-greedy"

[[criteria]]
criterion = "magnitude"

[finetune]
epochs = 3
lr = 0.01
"""


@pytest.fixture
def study_file(tmp_path: Path, tiny_file: Path, tiny_npz: Path) -> Path:
    assert tiny_file.parent == tiny_npz.parent == tmp_path
    path = tmp_path / "tiny.toml"
    path.write_text(STUDY)
    return path


def test_counts_are_those_of_the_splits_that_a_run_draws(study_file, tmp_path):
    study, out = load_study(study_file), tmp_path / "out"
    needs, tasks = needs_of(study, out)
    assert (len(needs.cells), needs.done, needs.missing, needs.downloads) == (4, [], [], [])
    assert not out.exists()
    run_study(study, out)
    splits = json.loads((out / "splits.json").read_text())
    assert not needs.is_assumed
    assert needs.images == {
        name: {split: len(places) for split, places in parts.items()}
        for name, parts in splits.items()
    }
    again, _ = needs_of(study, out)
    assert (len(again.done), again.left) == (4, [])
    (next(out.glob("cells/*0.75*.json"))).unlink()
    assert [cell.sparsity for cell in needs_of(study, out)[0].left] == [0.75]
    assert tasks is not None


def test_the_estimate_is_for_the_cells_that_are_left(study_file, tmp_path):
    study, out = load_study(study_file), tmp_path / "out"
    needs, tasks = needs_of(study, out)
    found = estimate(study, needs, tasks)
    assert set(found.seconds) == {"tiny"}
    assert found.seconds["tiny"] > 0
    assert found.memory > 10 * 2**20
    assert found.device_memory == 0 or found.device != "cpu"
    run_study(study, out)
    needs, tasks = needs_of(study, out)
    assert estimate(study, needs, tasks).seconds == {}


def test_missing_files_are_told_once_each(study_file, tmp_path):
    text = study_file.read_text().replace('"tiny.py:tiny"', '"tiny.py:tiny"\nweights = "w.pth"')
    study_file.write_text(text)
    (tmp_path / "tiny.npz").unlink()
    study = load_study(study_file)
    needs, tasks = needs_of(study, tmp_path / "out")
    assert tasks is None
    assert needs.missing == [*missing_data(study), *missing_weights(study)]
    assert needs.missing == [
        f"data {tmp_path / 'tiny.npz'} does not exist (tasks all, two)",
        f"weights {tmp_path / 'w.pth'} do not exist (model tiny)",
    ]
    # The classes of the first task are not known; two of the second have as many as ImageNet's.
    assert needs.images["all"] is None
    assert sum(needs.images["two"].values()) == 2 * 1300
    (tmp_path / "tiny.py").unlink()
    assert f"model file {tmp_path / 'tiny.py'} does not exist (model tiny)" in (
        missing_weights(study)
    )
    assert estimate(study, needs, tasks).seconds == {}


def test_a_split_of_a_file_and_a_name_of_timm_are_no_missing_files(study_file, tmp_path):
    found = np.load(tmp_path / "tiny.npz")
    classes = found["y"] % 2
    np.savez(tmp_path / "parts.npz", train_images=found["x"], train_labels=classes)
    text = study_file.read_text().replace('classes = ["red", "blue"]\n', "")
    study_file.write_text(text.replace('"tiny.npz"', '"parts.npz?split=train"'))
    needs, tasks = needs_of(load_study(study_file), tmp_path / "out")
    assert needs.missing == []
    assert tasks is not None
    study_file.write_text(text.replace('"tiny.npz"', '"torch/mnist?root=nowhere"', 1))
    assert missing_data(load_study(study_file)) == []
    study_file.write_text(text.replace('"tiny.npz"', '"none.npz?split=train"', 1))
    (line,) = missing_data(load_study(study_file))
    assert line == f"data {tmp_path / 'none.npz'} does not exist (tasks all)"


def test_images_that_cannot_be_used_are_missing_too(study_file, tmp_path):
    with np.load(tmp_path / "tiny.npz") as file:
        content = dict(file)
    np.savez(tmp_path / "tiny.npz", **{**content, "classes": np.array(["a", "b", "c"])})
    needs, tasks = needs_of(load_study(study_file), tmp_path / "out")
    assert tasks is None
    (line,) = needs.missing
    assert "red" in line


def test_the_tasks_of_the_paper_are_those_of_the_package(tmp_path):
    study = load_study(ROOT / "studies" / "paper.toml", root=tmp_path)
    assert {task.name: task.classes for task in study.tasks} == dict(IMAGENET_TASKS)
    assert [set(source.tasks) for source in study.sources] == [{name} for name in IMAGENET_TASKS]
    assert study.sparsities == (0.36, 0.59, 0.74, 0.83, 0.89)
    names = ["magnitude", "diag-fisher", "block-fisher", "obs-greedy", "features"]
    assert [how.name for how in study.criteria] == names
    assert [how.curvature for how in study.criteria] == [None] * 4 + ["features"]
    assert [how.compensate for how in study.criteria] == [False] * 3 + [True] * 2
    needs, tasks = needs_of(study, tmp_path / "out")
    assert tasks is None
    assert len(needs.cells) == 5 * 10 * 5 * 5
    assert [line.split()[0] for line in needs.missing] == ["data"] * 2 + ["weights"] * 3
    assert needs.images["t3"] == {"prune": 3900, "fit": 3900, "tune": 5200, "test": 500}


def test_the_small_study_differs_in_sizes_only(shared_data):
    paper = load_study(ROOT / "studies" / "paper.toml")
    small = load_study(ROOT / "studies" / "paper-small.toml", root=shared_data)
    assert [how.name for how in small.criteria] == [how.name for how in paper.criteria]
    assert set(small.sparsities) < set(paper.sparsities)
    needs, tasks = needs_of(small, Path("absent"))
    assert needs.missing == []
    assert tasks is not None
    # Ten tasks of ten classes, all hundred classes of CIFAR-100.
    assert [len(task.classes or ()) for task in small.tasks] == [10] * 10
    assert len({name for task in small.tasks for name in task.classes or ()}) == 100
