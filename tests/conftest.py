"""Fixtures that several tests share."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from fastsal.errors import FileFormatError
from fastsal.models.loading import load_model

ROOT = Path(__file__).resolve().parents[1]


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip the tests of a GPU where there is none."""
    if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
        pytest.skip("needs a GPU of CUDA; this machine has none")


@pytest.fixture(scope="session", autouse=True)
def _two_threads() -> None:
    torch.set_num_threads(2)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Matrices and layers as small as those of most tests only wait for a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Ctrl-C raises, here and in children, also if the tests run in the background of a shell."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of test images beside the checkout, or the one that FASTSAL_DATA names."""
    folder = Path(os.environ.get("FASTSAL_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "resnet20_cifar10.safetensors").is_file():
        pytest.skip(f"needs the test images; there are none in {folder} (set FASTSAL_DATA)")
    return folder


@pytest.fixture(scope="session")
def resnet20_spec() -> str:
    """The example model, as the command line names it."""
    return f"{ROOT / 'examples' / 'resnet20.py'}:resnet20"


@pytest.fixture(scope="module")
def resnet20(shared_data: Path, resnet20_spec: str) -> torch.nn.Module:
    """The published CIFAR ResNet-20, a copy for each test module."""
    weights = shared_data / "resnet20_cifar10.safetensors"
    return load_model(resnet20_spec, weights=weights)


@pytest.fixture(scope="session")
def cifar10(shared_data: Path) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """Opens `"train"` or `"test"`: images normalised as ImageNet's are, and labels."""

    def images_and_labels(part: str, count: int | None = None):
        with np.load(shared_data / f"cifar10_{part}.npz") as data:
            x, y = data["x"][:count], data["y"][:count]
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        images = ((torch.from_numpy(x) / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()
        return images, torch.from_numpy(y).long()

    return images_and_labels


@pytest.fixture
def read_flipped() -> Callable[..., Iterator[tuple[int, object]]]:
    """Flips bits of a file, one at a time; yields `(place, what was read)` where that went well."""

    def flips(path: Path, read: Callable[[Path], object], places: Iterable[tuple[int, int]]):
        whole = path.read_bytes()
        for at, bit in places:
            changed = bytearray(whole)
            changed[at] ^= 1 << bit
            path.write_bytes(changed)
            try:
                found = read(path)
            except FileFormatError:
                continue
            # Only where it says nothing: white space around the header.
            assert chr(whole[at]).isspace(), (at, bit)
            yield at, found

    return flips


TINY_MODEL = """
import torch
from torch import nn


class Tiny(nn.Module):
    def __init__(self, num_classes, width):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1)
        self.bn = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, num_classes)

    def forward_features(self, x):
        return torch.relu(self.bn(self.conv(x)))

    def forward(self, x):
        return self.fc(self.forward_features(x).mean(dim=(2, 3)))


def tiny(num_classes=3):
    return Tiny(num_classes, 8)


def wide(num_classes=3):
    return Tiny(num_classes, 16)


def rigid():
    return Tiny(3, 8)


def number():
    return 7
"""


@pytest.fixture
def tiny_file(tmp_path: Path) -> Path:
    """A file with functions that make a small model of three classes."""
    path = tmp_path / "tiny.py"
    path.write_text(TINY_MODEL)
    return path


@pytest.fixture
def tiny_npz(tmp_path: Path) -> Path:
    """Sixty 8x8 RGB images of three classes that a small model can tell apart."""
    rng = np.random.default_rng(0)
    y = np.arange(60) % 3
    x = rng.integers(0, 90, (60, 8, 8, 3))
    x[np.arange(60), :, :, y] += 120
    path = tmp_path / "tiny.npz"
    np.savez(path, x=x.astype(np.uint8), y=y, classes=np.array(["red", "green", "blue"]))
    return path


@pytest.fixture(scope="session")
def python_env() -> dict[str, str]:
    """The environment of a child process that imports the same packages."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
