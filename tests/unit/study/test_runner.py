"""What a study leaves behind when it cannot begin, and what it finds when it begins again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastsal.errors import FastsalError, FileFormatError, InvalidArgument
from fastsal.study import load_study, run_study
from fastsal.study.store import Store

pytestmark = pytest.mark.usefixtures("one_thread")

STUDY = """
name = "tiny"
sparsities = [0.5]
samples = 8
block_size = 16

[[models]]
model = "{model}"

[[tasks]]
name = "two"
data = "tiny.npz"
classes = {classes}

[[sources]]
tasks = "two"

[[criteria]]
criterion = "magnitude"
"""


@pytest.fixture
def write(tmp_path: Path, tiny_file: Path, tiny_npz: Path):
    """Write a study of the model and the images beside it, and read it."""
    assert tiny_file.parent == tiny_npz.parent == tmp_path

    def written(model="tiny.py:tiny", classes='["red", "blue"]'):
        path = tmp_path / "tiny.toml"
        path.write_text(STUDY.format(model=model, classes=classes))
        return load_study(path)

    return written


def test_a_mistake_that_is_mended_needs_no_other_folder(write, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(InvalidArgument, match="no class 'blu'"):
        run_study(write(classes='["red", "blu"]'), out)
    assert not out.exists()
    assert run_study(write(), out).done == 1
    with pytest.raises(InvalidArgument, match="the results of another study"):
        run_study(write(classes='["blue", "red"]'), out)
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidArgument, match="out: .* cannot be written"):
        run_study(write(), tmp_path / "file" / "out")


@pytest.mark.parametrize("text", ["null", "[]", "3"])
def test_damaged_splits_are_told(write, tmp_path, text):
    run_study(write(), tmp_path / "out")
    (tmp_path / "out" / "splits.json").write_text(text)
    with pytest.raises(FileFormatError, match=r"out: .*splits\.json is damaged"):
        run_study(write(), tmp_path / "out")


def test_a_result_is_not_hidden(write, tmp_path):
    """A model without a name has that of its file, which may begin with dots."""
    out = tmp_path / "out"
    study = write(model="./tiny.py:tiny")
    assert run_study(study, out).done == 1
    identity = json.loads((out / "study.json").read_text())["identity"]
    assert len(Store(out, identity).keys()) == 1
    assert run_study(study, out).done == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("held_out = 0.99", r"finetune\.held_out must .* got 0\.99: .* images of task 'two'"),
        ("held_out = 0.01", r"finetune\.held_out must .* got 0\.01: 0 of .* of task 'two'"),
        ("images = 1", r"finetune\.images must be at least 2, one for each class of .*, got 1"),
    ],
)
def test_too_few_images_for_fine_tuning_are_told_at_the_start(write, tmp_path, more, message):
    write()
    path = tmp_path / "tiny.toml"
    path.write_text(f"{path.read_text()}[finetune]\nepochs = 1\nlr = 0.1\n{more}\n")
    with pytest.raises(FastsalError, match=message):
        run_study(load_study(path), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", ["images", "test_images"])
def test_images_below_the_classes_name_the_task(write, tmp_path, key):
    write()
    path = tmp_path / "tiny.toml"
    path.write_text(path.read_text().replace("[[sources]]", f"{key} = 1\n[[sources]]"))
    with pytest.raises(FastsalError, match=f"task 'two': {key} must be at least 2, .* got 1"):
        run_study(load_study(path), tmp_path / "out")
