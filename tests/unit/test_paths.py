"""Every public function takes paths as text, also with `~`, as `Path` and as other `PathLike`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import nn

import fastsal
from fastsal.deploy.hub_folder import write_hub_folder
from fastsal.models import load_weights, read_weights, save_weights
from fastsal.study.report.results import read_results
from fastsal.transfer.head_cache import HeadCache, load_head, save_head
from fastsal.utils.paths import user_path

pytestmark = pytest.mark.usefixtures("one_thread")


class Place:
    """A path of another library."""

    def __init__(self, path):
        self._path = str(path)

    def __fspath__(self):
        return self._path


def in_home(path):
    """Return a path as a user writes it that is in the home folder."""
    if not Path(path).is_absolute():
        return str(path)
    return str(Path("~") / Path(path).relative_to(Path.home()))


KINDS = [str, Path, Place, in_home]


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))


def test_only_the_name_of_a_home_folder_is_replaced(tmp_path):
    assert user_path("~") == tmp_path
    assert user_path("~/a/~") == tmp_path / "a" / "~"
    assert str(user_path("~nobody-at-all/a")) == "~nobody-at-all/a"
    assert str(user_path("a~")) == "a~"


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 3))


def batches():
    torch.manual_seed(0)
    return [(torch.randn(24, 3, 8, 8), torch.arange(24) % 3)]


@pytest.mark.parametrize("kind", KINDS)
def test_weights_masks_and_statistics(kind, tmp_path):
    def at(name):
        return kind(tmp_path / name)

    model = net()
    save_weights(model, at("w.safetensors"))
    load_weights(model, at("w.safetensors"))
    assert set(read_weights(at("w.safetensors"))) == set(model.state_dict())
    masks = fastsal.rank(fastsal.score(model, None, "magnitude"), 0.5)
    masks.save(at("m.safetensors"))
    assert fastsal.Masks.load(at("m.safetensors")) == masks
    fisher = fastsal.collect(
        model, batches(), memory_budget="1GiB", scratch=kind(tmp_path), block_size=8
    )
    fisher.save(at("f"))
    fastsal.BlockFisher.load(at("f"))
    fisher.save(at("s.json"), shard_bytes="8KiB")
    fastsal.BlockFisher.load(at("s.json"))
    fastsal.merge_files([at("f"), at("s.json")], at("merged"))


@pytest.mark.parametrize("kind", KINDS)
def test_runs(kind, tmp_path):
    model = net()
    how = {"memory_budget": "1GiB", "scratch": kind(tmp_path), "block_size": 8}
    fastsal.plan_memory(model, batches(), calibrate=False, **how)
    result = fastsal.prune(
        model, batches(), 0.5, rounds=2, checkpoint=kind(tmp_path / "round"), **how
    )
    fastsal.finetune(
        model, batches(), result.masks, epochs=1, lr=0.1, checkpoint=kind(tmp_path / "epoch")
    )
    assert not (Path.cwd() / "~").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_folders_of_runs(kind, tmp_path, tiny_file):
    model = fastsal.load_model(kind(tiny_file) + ":tiny") if kind is in_home else None
    model = model or fastsal.load_model(f"{tiny_file}:tiny")
    masks = fastsal.prune(model, None, 0.5, criterion="magnitude", compensate=False).masks
    fastsal.save_run(kind(tmp_path / "run"), model, masks, spec=f"{tiny_file}:tiny")
    assert (tmp_path / "run" / "model.safetensors").is_file()
    fastsal.load_run(kind(tmp_path / "run"))
    fastsal.export(model, kind(tmp_path / "packed.safetensors"), format="packed")
    assert (tmp_path / "packed.safetensors").is_file()


@pytest.mark.parametrize("kind", KINDS)
def test_images_and_heads(kind, tmp_path, tiny_npz, tiny_file):
    images = fastsal.load_images(kind(tiny_npz))
    fastsal.open_images(kind(tiny_npz.name), root=kind(tmp_path))
    model = fastsal.load_model(f"{tiny_file}:tiny")
    save_weights(model, tmp_path / "w.safetensors")
    model = fastsal.load_model(f"{tiny_file}:tiny", weights=kind(tmp_path / "w.safetensors"))
    task = fastsal.Task.split("t", images)
    for cache in (kind(tmp_path / "heads"), HeadCache(kind(tmp_path / "heads"))):
        head = fastsal.fit_heads(model, task, cache=cache)["t"]
    save_head(kind(tmp_path / "head.safetensors"), head)
    load_head(kind(tmp_path / "head.safetensors"))


STUDY = """
name = "tiny"
sparsities = [0.5]
samples = 8
block_size = 16
models = [{ name = "tiny", model = "tiny.py:tiny" }]
tasks = [{ name = "colors", data = "tiny.npz" }]
sources = [{ tasks = "colors" }]
criteria = [{ criterion = "magnitude" }]
"""


@pytest.mark.parametrize("kind", KINDS)
def test_studies(kind, tmp_path, tiny_npz, tiny_file):
    (tmp_path / "tiny.toml").write_text(STUDY)
    study = fastsal.load_study(kind(tmp_path / "tiny.toml"), root=kind(tmp_path))
    given = {name: getattr(study, name) for name in ("models", "tasks", "sources", "criteria")}
    by_hand = fastsal.Study(
        study.name, **given, sparsities=(0.5,), block_size=16,
        root=kind(tiny_npz.parent), folder=kind(tiny_file.parent),
    )  # fmt: skip
    done = fastsal.run_study(by_hand, kind(tmp_path / "out"))
    assert (done.cells, done.failed) == (1, {})
    assert read_results(kind(tmp_path / "out")).rows


@pytest.mark.parametrize("kind", KINDS)
def test_folders_for_the_hub(kind, tmp_path):
    model = fastsal.load_model("test_vit", num_classes=3)
    masks = fastsal.prune(model, None, 0.5, criterion="magnitude", compensate=False).masks
    fastsal.save_run(tmp_path / "run", model, masks, "test_vit", num_classes=3)
    write_hub_folder(kind(tmp_path / "run"), kind(tmp_path / "hub"))
    again = fastsal.load_model(
        f"local-dir:{os.fspath(kind(tmp_path / 'hub'))}", weights="pretrained"
    )
    assert torch.equal(again.head.weight, model.head.weight)
