"""Axes, marks and whole pictures."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastsal.study.report import palette
from fastsal.study.report.chart import (
    Axis,
    Ids,
    Panel,
    Series,
    counted_axis,
    cut,
    inner_axis,
    linear_axis,
    log_axis,
    marker,
    svg,
)
from fastsal.study.report.figures import sparsity_axis
from fastsal.study.report.findings import sections
from fastsal.study.report.overview import picture
from fastsal.study.report.results import read_results

from .study_folder import write_study

RANGES = st.tuples(st.floats(-1e3, 1e3), st.floats(1e-3, 1e3)).map(lambda p: (p[0], p[0] + p[1]))


@given(RANGES, st.integers(2, 8))
def test_linear_axis_covers_its_range_with_round_ticks(ends, count):
    axis = linear_axis(*ends, count)
    slack = 1e-6 * (axis.high - axis.low)
    assert axis.low <= ends[0] + slack
    assert axis.high >= ends[1] - slack
    values = [v for v, _ in axis.ticks]
    steps = {round((b - a) / (values[1] - values[0]), 6) for a, b in zip(values, values[1:])}
    assert steps == {1.0}
    for value, text in axis.ticks:
        assert float(text.replace("−", "-")) == pytest.approx(value, abs=1e-9, rel=1e-6)


@given(RANGES)
def test_inner_axis_keeps_its_ends(ends):
    axis = inner_axis(*ends)
    slack = 1e-6 * (axis.high - axis.low)
    assert (axis.low, axis.high) == ends
    assert all(ends[0] - slack <= v <= ends[1] + slack for v, _ in axis.ticks)


def test_log_axis_has_whole_decades():
    axis = log_axis([3e-5, 0.2])
    assert (axis.low, axis.high) == (1e-5, 1.0)
    assert [text for _, text in axis.ticks] == ["10⁻⁵", "10⁻⁴", "10⁻³", "10⁻²", "10⁻¹", "10⁰"]
    assert axis.place(math.sqrt(axis.low * axis.high)) == pytest.approx(0.5)
    assert log_axis([1.0]).high == 10.0


def test_ticks_of_sparsity_are_those_of_the_study_where_there_is_room():
    assert [t for _, t in sparsity_axis([0.5, 0.7, 0.9]).ticks] == ["50", "70", "90"]
    crowded = sparsity_axis([0.1, 0.5, 0.9, 0.95, 0.98, 0.99])
    assert [t for _, t in crowded.ticks] == ["10", "50", "99"]
    assert [t for _, t in sparsity_axis([0.975]).ticks] == ["97.5"]


def test_long_names_are_cut_in_the_middle():
    name = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    short = cut(name, 120, 12)
    assert len(short) < len(name)
    first, last = short.split("…")
    assert name.startswith(first)
    assert name.endswith(last)
    assert last
    assert cut("short", 120, 12) == "short"


def test_names_are_escaped_in_pictures():
    panel = Panel("<b>&", Axis(0, 1, []), Axis(0, 1, []), tag='"source"')
    panel.level(0.5, "<dense>")
    text = svg(panel, "a <i>description</i>", Ids())
    root = ElementTree.fromstring(text)
    found = [e.text for e in root.iter() if e.text]
    assert "<b>&" in found
    assert "<dense>" in found
    assert "a <i>description</i>" in found


def test_marks_of_ten_methods_differ_and_stay_apart_beyond():
    looks = [(palette.color(i), palette.mark(i)) for i in range(40)]
    assert len(set(looks)) == 40
    assert len({marker(i, 0, 0) for i in range(10)}) == 10


def luminance(color):
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a, b):
    bright, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("colors", [palette.LIGHT, palette.DARK], ids=["light", "dark"])
def test_contrast_is_that_of_wcag_aa(colors):
    for name in ("ink", "muted", "link", "good", "bad", "open"):
        assert contrast(colors[name], colors["bg"]) >= 4.5, name
    for name in ("ink", "muted"):
        assert contrast(colors[name], colors["panel"]) >= 4.5, name
    for i in range(palette.COLORS):
        assert contrast(colors[f"c{i}"], colors["bg"]) >= 3, i


def test_a_line_passes_through_its_points():
    panel = Panel("t", Axis(0, 10, []), Axis(0, 100, []), width=120, height=130,
                  left=10, right=10, top=20, bottom=10)  # fmt: skip
    panel.line(Series(0, "a", [(0, 0.0, None, None), (10, 100.0, None, None)]))
    assert 'd="M10 120L110 20"' in panel.body()
    assert "band" not in panel.body()


def test_a_picture_that_stands_alone_has_its_own_colors(tmp_path):
    (part,) = sections(read_results(write_study(tmp_path)))
    text = picture(part)
    root = ElementTree.fromstring(text)
    assert "var(" not in text
    assert "prefers-color-scheme:dark" in text
    assert not re.search(r"(href|src|url\()", text)
    style = next(e.text for e in root.iter() if e.tag.endswith("style"))
    light, _, dark = style.partition("@media")
    assert palette.LIGHT["c0"] in light
    assert palette.DARK["c0"] in dark
    used = set(re.findall(r'class="([^"]+)"', text))
    known = set(re.findall(r"\.([a-z][a-z0-9]*)", light)) | {"before", "after"}
    assert {name for group in used for name in group.split()} <= known
    titles = [e.text for e in root.iter() if e.get("class") == "ti"]
    assert titles == ["cifar10", "cifar100", "mnist", "digits"]


@pytest.mark.parametrize("count", [1, 2, 3, 6, 7, 22, 54, 161])
def test_layers_are_counted_in_whole_numbers(count):
    axis = counted_axis(count)
    values = [v for v, _ in axis.ticks]
    assert all(isinstance(v, int) and axis.low <= v <= axis.high for v in values)
    assert 1 <= len(values) <= 7
    assert axis.place(1) >= 0
    assert axis.place(count) <= 1
