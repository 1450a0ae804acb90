"""Suggestions and lists of names in messages."""

from __future__ import annotations

import pytest

from fastsal.errors import InvalidArgument
from fastsal.utils.suggestions import check_choice, closest, did_you_mean, listed


def test_listed_counts_what_it_leaves_out():
    assert listed(["a", "b"]) == "a, b"
    assert listed([]) == ""
    assert listed(["a", "b", "c", "d"], most=2) == "a, b and 2 more"


def test_closest_is_empty_for_what_is_no_text():
    assert closest("resnet8", ["resnet18", "vit"]) == ["resnet18"]
    assert closest(8, ["8"]) == []


def test_did_you_mean_ends_a_message():
    assert did_you_mean("resnet8", ["resnet18", "vit"]) == "; did you mean 'resnet18'?"
    assert did_you_mean("ab", ["abc", "abd"]).endswith(" or 'abc'?")
    assert did_you_mean("xyz", ["resnet18"]) == ""


def test_check_choice_names_argument_choices_and_value():
    check_choice("scope", "layer", ("global", "layer"))
    with pytest.raises(InvalidArgument) as error:
        check_choice("scope", "layr", ("global", "layer", "erk"))
    assert str(error.value) == (
        "scope must be 'global', 'layer' or 'erk', got 'layr'; did you mean 'layer'?"
    )
    with pytest.raises(InvalidArgument, match="scope must be 'global' or 'layer', got 3"):
        check_choice("scope", 3, ("global", "layer"))
