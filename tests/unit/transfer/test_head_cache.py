from __future__ import annotations

import os
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from fastsal.data.corruptions import corrupt
from fastsal.data.folders import load_images
from fastsal.data.image_set import ImageSet
from fastsal.errors import InvalidArgument
from fastsal.models.inputs import InputSpec
from fastsal.transfer import heads as heads_module
from fastsal.transfer.head_cache import HeadCache, load_head, model_digest, save_head, split_digest
from fastsal.transfer.heads import fit_heads
from fastsal.transfer.tasks import Task

pytestmark = pytest.mark.usefixtures("one_thread")

SPEC = InputSpec(3, None, (0.5,) * 3, (0.5,) * 3)
KINDS = ("ridge", "knn", "probe")


class Net(nn.Module):
    def __init__(self, slope=0.1):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.act = nn.LeakyReLU(slope)
        self.register_buffer("shift", torch.zeros(4), persistent=False)
        with torch.no_grad():
            self.conv.weight.copy_(torch.arange(12.0).view(4, 3, 1, 1).cos())
            self.conv.bias.zero_()

    def forward_features(self, x):
        return self.act(self.conv(x)) + self.shift[:, None, None]


def images(seed=0, source="file"):
    rng = np.random.default_rng(seed)
    y = np.arange(48) % 3
    x = rng.integers(0, 99, (48, 4, 4, 3))
    x[np.arange(48), :, :, y] += 100
    return ImageSet(x.astype(np.uint8), y, ("a", "b", "c"), source)


@pytest.fixture
def collected(monkeypatch):
    """Counts how often features are taken."""
    seen = []
    collect = heads_module._collect
    monkeypatch.setattr(
        heads_module,
        "_collect",
        lambda model, task, *a: seen.append(task) or collect(model, task, *a),
    )
    return seen


def tensors(head):
    found = (head.bank, head.labels) if hasattr(head, "bank") else (head.weight, head.bias)
    return [t.numpy().tobytes() for t in found]


def assert_same(a, b):
    assert type(a) is type(b)
    assert tensors(a) == tensors(b)
    plain = [{k: v for k, v in vars(h).items() if not isinstance(v, torch.Tensor)} for h in (a, b)]
    assert plain[0] == plain[1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_hit_gives_the_same_bits_without_a_pass(kind, tmp_path, collected):
    task = Task.split("t", images())
    first = fit_heads(Net(), task, kind=kind, k=5, spec=SPEC, cache=tmp_path)["t"]
    again = fit_heads(Net(), task, kind=kind, k=5, spec=SPEC, cache=HeadCache(tmp_path))["t"]
    assert len(collected) == 1
    assert_same(first, again)
    assert_same(first, fit_heads(Net(), task, kind=kind, k=5, spec=SPEC)["t"])
    renamed = Task("other", task.fit, task.test)
    found = fit_heads(Net(), renamed, kind=kind, k=5, spec=SPEC, cache=tmp_path)["other"]
    assert found.task == "other"
    assert tensors(found) == tensors(first)
    assert len(collected) == 2
    assert [p.suffix for p in tmp_path.iterdir()] == [".safetensors"]


def changed_weight():
    net = Net()
    with torch.no_grad():
        net.conv.weight[0, 0, 0, 0] += 1e-6
    return net


def changed_buffer():
    net = Net()
    net.shift[2] = 1
    return net


def without(part, i):
    return part.subset([j for j in range(len(part)) if j != i])


FIT = images().subset(range(24))
CHANGES = {
    "weight": {"model": changed_weight()},
    "buffer": {"model": changed_buffer()},
    "slope of a module without weights": {"model": Net(0.2)},
    "pixels": {"fit": ImageSet(FIT.x ^ 1, FIT.y, FIT.classes)},
    "labels": {"fit": ImageSet(FIT.x, (FIT.y + 1) % 3, FIT.classes)},
    "fewer images": {"fit": without(FIT, 5)},
    "names of classes": {"fit": ImageSet(FIT.x, FIT.y, ("a", "b", "z"))},
    "order": {"fit": FIT.subset([1, 0, *range(2, 24)])},
    "mean": {"spec": InputSpec(3, None, (0.4, 0.5, 0.5), (0.5,) * 3)},
    "size": {"spec": InputSpec(3, (8, 8), (0.5,) * 3, (0.5,) * 3)},
    "kind": {"kind": "knn"},
    "ridge": {"ridge": 0.2},
}


@pytest.mark.parametrize("what", CHANGES)
def test_another_anything_is_another_head(what, tmp_path, collected):
    base = {"model": Net(), "fit": FIT, "spec": SPEC, "kind": "ridge", "ridge": 0.1}

    def fit(model, fit, **given):
        test = ImageSet(FIT.x, FIT.y, fit.classes, "test")
        fit_heads(model, Task("t", fit, test), k=5, cache=tmp_path, **given)

    fit(**base)
    fit(**{**base, **CHANGES[what]})
    assert len(collected) == 2
    fit(**base)
    fit(**{**base, **CHANGES[what]})
    assert len(collected) == 2


@pytest.mark.parametrize(
    ("kind", "same", "other"),
    [
        ("ridge", {"k": 7, "l2": 0.1, "seed": 9}, {"ridge": 0.3}),
        ("knn", {"ridge": 0.3, "l2": 0.1, "seed": 9}, {"temperature": 0.1}),
        ("knn", {"ridge": 0.3}, {"k": 6}),
        ("probe", {"ridge": 0.3, "k": 7}, {"seed": 1}),
        ("probe", {"ridge": 0.3, "k": 7}, {"l2": 0.1}),
    ],
)
def test_only_the_settings_of_its_kind_count(kind, same, other, tmp_path, collected):
    task = Task.split("t", images())
    base = {"kind": kind, "k": 5, "spec": SPEC, "cache": tmp_path}
    fit_heads(Net(), task, **base)
    fit_heads(Net(), task, **{**base, **same})
    assert len(collected) == 1
    fit_heads(Net(), task, **{**base, **other})
    assert len(collected) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_never_used(kind, tmp_path, collected):
    task = Task.split("t", images())
    given = {"kind": kind, "k": 5, "spec": SPEC, "cache": tmp_path}
    first = fit_heads(Net(), task, **given)["t"]
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    damages = {
        "empty": b"",
        "truncated": whole[:-9],
        "a bit of a weight": whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:],
        "a digit of the scale": whole.replace(b'\\"scale\\": ', b'\\"scale\\": 1', 1),
        "another version": whole.replace(b'\\"version\\": 1', b'\\"version\\": 0', 1),
        "no head": b"hello",
    }
    for what, content in damages.items():
        path.write_bytes(content)
        assert content != whole, what
        with pytest.warns(UserWarning, match="cache: path: .* the head is fitted again"):
            again = fit_heads(Net(), task, **given)["t"]
        assert_same(first, again)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert_same(first, fit_heads(Net(), task, **given)["t"])
    assert len(collected) == 1 + len(damages)


def test_the_file_of_another_key_is_not_taken_for_this_one(tmp_path):
    cache = HeadCache(tmp_path)
    head = fit_heads(Net(), Task.split("t", images()), spec=SPEC)["t"]
    cache.put("a" * 64, head)
    os.replace(cache.path("a" * 64), cache.path("b" * 64))
    with pytest.warns(UserWarning, match="holds the head of another key"):
        assert cache.get("b" * 64) is None
    assert cache.get("a" * 64) is None


@pytest.mark.parametrize("kind", KINDS)
def test_heads_are_saved_and_loaded(kind, tmp_path, read_flipped):
    head = fit_heads(Net(), Task.split("t", images()), kind=kind, k=5, spec=SPEC)["t"]
    save_head(tmp_path / "deep" / "head.safetensors", head)
    path = tmp_path / "deep" / "head.safetensors"
    assert_same(load_head(path), head)
    places = [(i, i % 8) for i in range(0, path.stat().st_size, 7)]
    for _, found in read_flipped(path, load_head, places):
        assert_same(found, head)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_head(tmp_path / "none.safetensors")


def test_own_heads_are_not_written(tmp_path):
    own = fit_heads(
        nn.Sequential(nn.Flatten(), nn.Linear(48, 3)),
        Task.split("t", images()),
        kind="own",
        spec=SPEC,
        cache=tmp_path,
    )["t"]
    assert not list(tmp_path.iterdir())
    with pytest.raises(InvalidArgument, match="head must be a fitted head, got the model's own"):
        save_head(tmp_path / "x.safetensors", own)


def write_files(root):
    for i, image in enumerate(images().x):
        folder = root / "abc"[i % 3]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{i:02d}.bmp")
    return load_images(root)


def test_files_count_by_their_content(tmp_path):
    a, b = write_files(tmp_path / "one"), write_files(tmp_path / "two")
    assert split_digest(a) == split_digest(b)  # wherever the folder lies, and whenever it was made
    os.rename(b.x[0], b.x[0].with_name("000.bmp"))
    assert split_digest(load_images(tmp_path / "two")) == split_digest(a)
    status = b.x[3].stat()
    whole = b.x[3].read_bytes()
    b.x[3].write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))  # of the same size
    os.utime(b.x[3], ns=(status.st_atime_ns, status.st_mtime_ns))
    assert b.x[3].stat().st_size == status.st_size
    assert b.x[3].stat().st_mtime_ns == status.st_mtime_ns
    assert split_digest(load_images(tmp_path / "two")) != split_digest(a)


def test_heads_of_files_with_other_content_are_fitted_again(tmp_path, collected):
    task = Task.split("t", write_files(tmp_path / "one"))
    fit_heads(Net(), task, spec=SPEC, cache=tmp_path / "heads")
    fit_heads(Net(), task, spec=SPEC, cache=tmp_path / "heads")
    assert len(collected) == 1
    file = task.fit.x[0]
    status = file.stat()
    Image.fromarray(255 - np.asarray(Image.open(file))).save(file)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    fit_heads(Net(), task, spec=SPEC, cache=tmp_path / "heads")
    assert len(collected) == 2


def test_transforms_of_files_count(tmp_path):
    files = write_files(tmp_path / "one")
    found = {
        split_digest(some)
        for some in (
            files,
            corrupt(files, "contrast", severity=1),
            corrupt(files, "contrast", severity=5),
            corrupt(files, "blur", severity=5),
            files.transformed(lambda pixels, _: pixels // 2),
            files.transformed(lambda pixels, _: pixels // 4),
        )
    }
    assert len(found) == 6
    again = corrupt(load_images(tmp_path / "one"), "blur", severity=5)
    assert split_digest(again) in found


def test_batches_count_by_what_they_hold():
    batches = list(images().batches(SPEC, 16))
    assert split_digest(batches) == split_digest([(x.clone(), y.clone()) for x, y in batches])
    other = [(x, y.roll(1)) for x, y in batches]
    assert split_digest(batches) != split_digest(other)


def test_the_digest_of_a_model_does_not_change_between_runs():
    model = nn.Sequential(Net(), nn.GELU(), nn.BatchNorm2d(4).to(torch.float64))
    model[2].half()
    assert model_digest(model) == model_digest(model)
    assert model_digest(Net()) == model_digest(Net().train())
    assert model_digest(Net()) != model_digest(Net().bfloat16())


def test_a_cache_that_cannot_be_written_loses_no_head(tmp_path):
    (tmp_path / "file").write_text("")
    task = Task.split("t", images())
    with pytest.warns(UserWarning, match="cache: the head of 't' is not stored in .*file"):
        head = fit_heads(Net(), task, spec=SPEC, cache=tmp_path / "file" / "heads")["t"]
    assert_same(head, fit_heads(Net(), task, spec=SPEC)["t"])
