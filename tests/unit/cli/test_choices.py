"""Choices of the command line are those of the library."""

from __future__ import annotations

import click
import pytest
from click.testing import CliRunner

from fastsal.cli import main
from fastsal.finetuning import trainer
from fastsal.pruning.criteria import CRITERIA
from fastsal.pruning.masks import ranking
from fastsal.transfer import heads
from fastsal.utils import choices


def offered(command, name):
    (param,) = [p for p in main.commands[command].params if p.name == name]
    assert isinstance(param.type, click.Choice)
    return tuple(param.type.choices)


def test_names_of_criteria_are_those_of_the_registry():
    assert set(choices.CRITERION_NAMES) == set(CRITERIA)


def test_names_are_those_of_the_library():
    assert tuple(ranking.SCOPES) == choices.SCOPES
    assert tuple(trainer.SCHEDULES) == choices.SCHEDULES
    assert tuple(getattr(heads, "KINDS", choices.HEAD_KINDS)) == choices.HEAD_KINDS


@pytest.mark.parametrize(
    ("command", "name", "wanted"),
    [
        ("prune", "criterion", choices.CRITERION_NAMES),
        ("plan", "criterion", choices.CRITERION_NAMES),
        ("score", "criterion", choices.CRITERION_NAMES),
        ("transfer", "criteria", choices.CRITERION_NAMES),
        ("prune", "scope", choices.SCOPES),
        ("rank", "scope", choices.SCOPES),
        ("prune", "curvature", choices.CURVATURES),
        ("score", "precision", choices.PRECISIONS),
        ("finetune", "schedule", choices.SCHEDULES),
        ("finetune", "autocast", choices.AUTOCAST_TYPES),
        ("transfer", "head", choices.HEAD_KINDS),
        ("transfer", "save", choices.SAVED),
    ],
)
def test_options_offer_all_choices(command, name, wanted):
    assert offered(command, name) == wanted


def test_a_message_names_the_option_as_its_help_does():
    done = CliRunner().invoke(main, ["prune", "net", "--amp", "float8", "--out", "run"])
    assert "--amp must be one of bfloat16, float16, got 'float8'" in done.output
