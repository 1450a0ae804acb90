"""TF32 is off where sums are formed, and as it was afterwards, by whichever setting it was made."""

from __future__ import annotations

import pytest
import torch

from fastsal.fisher.model_sums import ModelSums
from fastsal.fisher.sinks.tiles import DeviceTiles
from fastsal.gradients.precision import convolutions_in_float32, full_float32

matmul = torch.backends.cuda.matmul
HAS_NEW = hasattr(torch.backends, "fp32_precision")
needs_new = pytest.mark.skipif(not HAS_NEW, reason="PyTorch has no fp32_precision")


def settings():
    """All settings, as far as they can be read."""
    found = []
    for read in (
        lambda: matmul.allow_tf32,
        torch.get_float32_matmul_precision,
        lambda: matmul.fp32_precision,
        lambda: torch.backends.fp32_precision,
        lambda: torch.backends.mkldnn.matmul.fp32_precision,
    ):
        try:
            found.append(read())
        except (RuntimeError, AttributeError) as error:
            found.append(type(error))
    return found


def set_allow(value):
    matmul.allow_tf32 = value


def set_matmul(value):
    matmul.fp32_precision = value


def set_all(value):
    torch.backends.fp32_precision = value


@pytest.fixture(autouse=True)
def restored():
    yield
    torch.set_float32_matmul_precision("highest")
    if HAS_NEW:
        torch.backends.fp32_precision = "none"
        matmul.fp32_precision = "none"
        torch.backends.mkldnn.matmul.fp32_precision = "none"


WAYS = {
    "default": [],
    "allow": [(set_allow, True)],
    "high": [(torch.set_float32_matmul_precision, "high")],
    "medium": [(torch.set_float32_matmul_precision, "medium")],
    "matmul": [(set_matmul, "tf32")],
    "all": [(set_all, "tf32")],
    "all but matmul": [(set_all, "tf32"), (set_matmul, "ieee")],
    "high, then ieee": [(torch.set_float32_matmul_precision, "high"), (set_matmul, "ieee")],
}


@pytest.mark.parametrize(
    "way", [pytest.param(w, marks=needs_new if "a" in w[:1] or "m" in w else ()) for w in WAYS]
)
def test_settings_are_restored(way):
    for change, value in WAYS[way]:
        change(value)
    before = settings()
    with full_float32():
        if HAS_NEW:
            assert matmul.fp32_precision in ("ieee", "none")
        else:
            assert not matmul.allow_tf32
    assert settings() == before
    with pytest.raises(ZeroDivisionError), full_float32():
        raise ZeroDivisionError
    assert settings() == before


@needs_new
def test_a_setting_for_all_operations_still_applies_afterwards():
    set_all("tf32")
    with full_float32():
        pass
    set_all("ieee")
    assert matmul.fp32_precision == "ieee"


@needs_new
@pytest.mark.parametrize("change", [set_matmul, set_all])
def test_sums_on_a_device_where_tf32_was_set_by_the_new_names(change):
    change("tf32")
    sums = ModelSums.empty({"w": (10,)}, 4, "float32")
    tiles = DeviceTiles(sums, torch.device("cpu"))
    rows = torch.randn(5, 10)
    tiles("w", rows)
    tiles.end_micro_batch(5)
    tiles.flush()
    torch.testing.assert_close(torch.from_numpy(sums.parameters["w"].sums), rows.sum(0))
    assert matmul.fp32_precision == "tf32"


def conv_settings():
    cudnn = torch.backends.cudnn
    found = []
    for read in (
        lambda: cudnn.allow_tf32,
        lambda: cudnn.conv.fp32_precision,
        lambda: cudnn.rnn.fp32_precision,
        lambda: torch.backends.fp32_precision,
    ):
        try:
            found.append(read())
        except (RuntimeError, AttributeError) as error:
            found.append(type(error))
    return found


CONVOLUTIONS = {
    "default": lambda: None,
    "allow": lambda: setattr(torch.backends.cudnn, "allow_tf32", True),
    "forbid": lambda: setattr(torch.backends.cudnn, "allow_tf32", False),
    "new: on": lambda: setattr(torch.backends.cudnn.conv, "fp32_precision", "tf32"),
    "new: off": lambda: setattr(torch.backends.cudnn.conv, "fp32_precision", "ieee"),
    "new: of all": lambda: (
        setattr(torch.backends.cudnn.conv, "fp32_precision", "none"),
        setattr(torch.backends, "fp32_precision", "tf32"),
    ),
}


@pytest.mark.parametrize(
    "way", [pytest.param(w, marks=needs_new if "new" in w else ()) for w in CONVOLUTIONS]
)
def test_settings_of_convolutions_are_restored(way):
    cudnn = torch.backends.cudnn
    at_start = cudnn.conv.fp32_precision if HAS_NEW else None
    try:
        CONVOLUTIONS[way]()
        before = conv_settings()
        with convolutions_in_float32():
            if HAS_NEW:
                assert cudnn.conv.fp32_precision in ("ieee", "none")
            else:
                assert not cudnn.allow_tf32
        assert conv_settings() == before
    finally:
        cudnn.allow_tf32 = True
        if HAS_NEW:
            cudnn.conv.fp32_precision = at_start
