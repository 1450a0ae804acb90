"""Means and t-intervals, against SciPy."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastsal.study.report.intervals import band, median, t_interval, t_quantile

NUMBERS = st.lists(st.floats(-100, 100), min_size=2, max_size=12)


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 8, 9, 29, 30, 100])
@pytest.mark.parametrize("probability", [0.501, 0.6, 0.9, 0.975, 0.995, 0.9999])
def test_quantile_is_that_of_scipy(probability, freedom):
    stats = pytest.importorskip("scipy.stats", reason="needs SciPy to compare with")
    expected = stats.t.ppf(probability, freedom)
    assert t_quantile(probability, freedom) == pytest.approx(expected, rel=1e-10)


@given(NUMBERS)
def test_interval_is_that_of_scipy(values):
    stats = pytest.importorskip("scipy.stats", reason="needs SciPy to compare with")
    found = t_interval(values)
    error, low, high = stats.sem(values), found.mean, found.mean
    if error > 1e-9:  # for none SciPy gives NaN, and sums of equal numbers are not exact
        low, high = stats.t.interval(
            0.95, len(values) - 1, loc=sum(values) / len(values), scale=error
        )
    assert found.n == len(values)
    assert found.low == pytest.approx(low, rel=1e-9, abs=1e-6)
    assert found.high == pytest.approx(high, rel=1e-9, abs=1e-6)


@given(NUMBERS)
def test_order_of_seeds_does_not_matter(values):
    assert t_interval(values).mean == t_interval(values[::-1]).mean


def test_one_value_has_no_interval():
    found = t_interval([0.25])
    assert (found.mean, found.low, found.high, found.n) == (0.25, None, None, 1)


def test_band_of_two_is_their_range_and_of_three_the_t_interval():
    assert (band([1.0, 3.0]).low, band([1.0, 3.0]).high) == (1.0, 3.0)
    assert band([1.0, 3.0, 2.0]) == t_interval([1.0, 3.0, 2.0])
    assert t_interval([1.0, 3.0]).high == pytest.approx(2 + 12.7062047362, rel=1e-9)


def test_scaled_interval_keeps_its_shape():
    found = t_interval([0.1, 0.2, 0.4]).scaled(100)
    assert found.mean == pytest.approx(70 / 3)
    assert found.high - found.mean == pytest.approx(found.mean - found.low)


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=9))
def test_median_has_half_of_the_values_on_each_side(values):
    middle = median(values)
    assert sum(v < middle for v in values) <= len(values) / 2
    assert sum(v > middle for v in values) <= len(values) / 2
    assert math.isfinite(middle)
