"""Corruptions = their formulas, image by image."""

from __future__ import annotations

import colorsys
import io
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from fastsal.data.corruptions import Corruption, corrupt
from fastsal.data.folders import load_images
from fastsal.data.image_set import ImageSet
from fastsal.errors import DataError, InvalidArgument
from fastsal.models.inputs import InputSpec
from fastsal.transfer import Task
from fastsal.utils.choices import CORRUPTION_KINDS

pytestmark = pytest.mark.usefixtures("one_thread")

SPEC = InputSpec(3, None, (0.0,) * 3, (1.0,) * 3)
CHANGES = {  # severity 2 of small images, of large ones
    "gaussian-noise": (0.06, 0.12), "blur": (0.6, 2.0), "jpeg": (65, 18),
    "brightness": (0.1, 0.2), "contrast": (0.5, 0.3),
}  # fmt: skip


def smooth(n=5, h=16, w=20, c=3, seed=0):
    """Random images that are not all noise: a coarse grid, enlarged."""
    coarse = np.random.default_rng(seed).integers(0, 256, (n, 4, 4, c), dtype=np.uint8)
    x = np.stack([
        np.stack([np.asarray(Image.fromarray(p[..., k]).resize((w, h), Image.BILINEAR))
                  for k in range(c)], axis=-1)
        for p in coarse
    ])  # fmt: skip
    return ImageSet(x, np.arange(n) % 2)


def slow(kind, pixels, parameter, seed, index):
    x = pixels / 255
    h, w, c = x.shape
    if kind == "gaussian-noise":
        out = x + parameter * np.random.default_rng([seed, index]).standard_normal(x.shape)
    elif kind == "contrast":
        out = np.empty_like(x)
        for k in range(c):
            mean = x[..., k].mean()
            out[..., k] = mean + parameter * (x[..., k] - mean)
    elif kind == "brightness":
        out = np.empty_like(x)
        for i, j in np.ndindex(h, w):
            hue, saturation, value = colorsys.rgb_to_hsv(
                *(x[i, j] if c == 3 else x[i, j].repeat(3))
            )
            out[i, j] = colorsys.hsv_to_rgb(hue, saturation, min(1, value + parameter))[:c]
    elif kind == "jpeg":
        file = io.BytesIO()
        Image.fromarray(pixels.squeeze()).save(file, "JPEG", quality=parameter)
        return np.asarray(Image.open(file)).reshape(pixels.shape)
    else:
        reach = int(4 * parameter + 0.5)
        at = np.arange(-reach, reach + 1)
        weight = np.exp(-(at[:, None] ** 2 + at**2) / (2 * parameter**2))
        weight /= weight.sum()
        out = np.zeros_like(x)
        for i, j in np.ndindex(h, w):
            rows, columns = np.clip(i + at, 0, h - 1), np.clip(j + at, 0, w - 1)
            out[i, j] = np.einsum("ab,abc->c", weight, x[np.ix_(rows, columns)])
    return np.clip(out, 0, 1) * 255


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("shape", [(16, 20), (70, 66)])
@pytest.mark.parametrize("kind", CORRUPTION_KINDS)
def test_corruptions_equal_their_formulas(kind, shape, channels):
    images = smooth(2, *shape, channels)
    parameter = CHANGES[kind][min(shape) > 64]
    found = corrupt(images, kind, severity=2, seed=4)
    assert found.x.shape == images.x.shape
    assert found.x.dtype == np.uint8
    for i in range(2):
        want = slow(kind, images.x[i], parameter, 4, i)
        assert np.abs(found.x[i] - want).max() <= 0.5 + 1e-9


@pytest.mark.parametrize("kind", CORRUPTION_KINDS)
def test_higher_severities_change_more(kind):
    images = smooth(8, 32, 32)
    changes = [
        np.abs(corrupt(images, kind, severity).x.astype(float) - images.x).mean()
        for severity in range(1, 6)
    ]
    assert changes == sorted(changes)
    assert changes[0] > 0.05


@pytest.mark.parametrize("kind", CORRUPTION_KINDS)
def test_an_image_does_not_depend_on_the_others(kind):
    images = smooth(6)
    whole = corrupt(images, kind, seed=1)
    part = corrupt(images.subset([4, 1]), kind, seed=1)
    assert np.array_equal(part.x, whole.x[[4, 1]])
    assert np.array_equal(corrupt(images, kind, seed=1).x, whole.x)
    is_random = kind == "gaussian-noise"
    assert np.array_equal(corrupt(images, kind, seed=2).x, whole.x) != is_random
    assert (whole.source, whole.classes) == (images.source, images.classes)
    assert np.array_equal(whole.index, images.index)
    assert np.array_equal(whole.y, images.y)


def test_noise_differs_from_image_to_image():
    images = ImageSet(np.full((2, 8, 8, 3), 128, np.uint8), np.array([0, 1]))
    x = corrupt(images, "gaussian-noise").x.astype(float)
    assert not np.array_equal(x[0], x[1])
    assert x.std() == pytest.approx(0.08 * 255, rel=0.15)


@pytest.mark.parametrize("kind", CORRUPTION_KINDS)
def test_files_are_corrupted_as_arrays_are(tmp_path, kind):
    images = smooth(6)
    for i, pixels in enumerate(images.x):
        folder = tmp_path / f"class{i // 3}"
        folder.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    files = load_images(tmp_path)
    found = corrupt(files, kind, seed=3)
    assert isinstance(found.x, tuple)
    a = torch.cat([x for x, _ in found.batches(SPEC, 4)])
    b = torch.cat([x for x, _ in corrupt(images, kind, seed=3).batches(SPEC, 4)])
    assert torch.equal(a, b)
    clean = torch.cat([x for x, _ in files.batches(SPEC)])
    assert not torch.equal(a, clean)
    for part, at in (
        (found.subset([5, 0]), [5, 0]),
        (found.select_classes(["class1", "class0"]), [0, 1, 2, 3, 4, 5]),
    ):
        assert torch.equal(torch.cat([x for x, _ in part.batches(SPEC)]), a[at])
    one, two = found.split(2 / 3, 1 / 3)
    assert len(one) == 4
    assert torch.equal(torch.cat([x for x, _ in two.batches(SPEC)]), a[torch.from_numpy(two.index)])
    twice = torch.cat([x for x, _ in corrupt(found, "contrast").batches(SPEC)])
    again = torch.cat([
        x for x, _ in corrupt(corrupt(images, kind, seed=3), "contrast").batches(SPEC)
    ])  # fmt: skip
    assert torch.equal(twice, again)


def test_corrupted_images_are_still_known_for_the_same():
    images = smooth(8)
    noisy = corrupt(images, "gaussian-noise")
    with pytest.raises(DataError, match="image 4 of array"):
        Task("t", noisy.subset([0, 1, 2, 3, 4]), images.subset([4, 5, 6, 7]))
    Task("t", noisy.subset([0, 1, 2, 3]), images.subset([4, 5, 6, 7]))


def test_black_and_white_under_brightness():
    x = np.zeros((1, 2, 2, 3), np.uint8)
    x[0, 0] = 255
    y = Corruption("brightness", 5)(x[0], 0)
    assert (y[0] == 255).all()
    assert (y[1] == round(0.3 * 255)).all()


def test_a_corruption_can_be_sent_to_a_worker():
    corruption = Corruption("gaussian-noise", 2, 7)
    x = smooth(1).x[0]
    assert np.array_equal(pickle.loads(pickle.dumps(corruption))(x, 5), corruption(x, 5))


def test_what_is_not_taken():
    images = smooth()
    for change, message in (
        ({"kind": "fog"}, "^kind must be 'gaussian-noise', 'blur', .*got 'fog'"),
        ({"severity": 0}, r"^severity must be in \[1, 5\], got 0"),
        ({"severity": 6}, r"^severity must be in \[1, 5\], got 6"),
        ({"severity": 2.5}, "^severity must be an integer, got 2.5"),
        ({"seed": -1}, "^seed must be at least 0, got -1"),
        ({"seed": 0.5}, "^seed must be an integer, got 0.5"),
    ):
        with pytest.raises(InvalidArgument, match=message):
            corrupt(images, **{"kind": "blur", **change})
    for kind in ("jpeg", "brightness"):
        with pytest.raises(DataError, match=f"^x must have 1 or 3 channels for '{kind}', got 4"):
            corrupt(smooth(c=4), kind)
    assert corrupt(smooth(c=4), "contrast").x.shape == (5, 16, 20, 4)
    with pytest.raises(InvalidArgument, match="^transform must be None for images in memory"):
        ImageSet(images.x, images.y, transform=Corruption("blur", 1))


@pytest.mark.parametrize("number", [np.int64, torch.tensor])
def test_numpy_and_torch_scalars_are_numbers(number):
    images = smooth()
    found = corrupt(images, "gaussian-noise", severity=number(2), seed=number(7))
    assert np.array_equal(found.x, corrupt(images, "gaussian-noise", severity=2, seed=7).x)
    for name in ("severity", "seed"):
        with pytest.raises(InvalidArgument, match=f"^{name} must be an integer, got True"):
            corrupt(images, "blur", **{name: True})
