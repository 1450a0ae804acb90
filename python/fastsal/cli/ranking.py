"""Options of commands that rank scores, and the arguments of `fastsal.rank` from them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from fastsal.cli.options import F, together
from fastsal.cli.types import NUMBER, SPARSITY, choice
from fastsal.errors import InvalidArgument
from fastsal.utils.choices import SCOPES

ranking_options: Callable[[F], F] = together(
    click.option(
        "--sparsity",
        type=SPARSITY,
        metavar="S|PATTERN=S,...",
        help="Fraction of weights to prune, in [0, 1]; or fractions by names of parameters: "
        "'*.attn.*=0.5,*=0.7'.",
    ),
    click.option(
        "--scope",
        type=choice(SCOPES),
        default="global",
        show_default=True,
        help="Allocation of the sparsity: one threshold for all weights (global), the same "
        "sparsity in every layer (layer), or a sparsity by layer shape (erk, Erdős-Rényi kernel).",
    ),
    click.option(
        "--pattern",
        metavar="N:M|1xM",
        help="Sparsity pattern: 2:4 keeps two of every four weights along the input axis; 1x4 "
        "keeps or prunes four neighboring weights together.",
    ),
    click.option(
        "--floor",
        type=NUMBER,
        show_default="0",
        help="Least fraction of weights to keep in each parameter, in [0, 1].",
    ),
)


def ranking_arguments(given: dict[str, Any], *, finds_sparsity: bool = False) -> dict[str, Any]:
    """Return the arguments of `fastsal.rank` that were given as options.

    With `finds_sparsity` neither a sparsity nor a pattern is required.

    Raises:
        InvalidArgument: A fraction is out of range, or the sparsity is missing without a pattern
            that fixes it.
    """
    if given["sparsity"] is None and given["pattern"] is None and not finds_sparsity:
        raise InvalidArgument("--sparsity or --pattern is required")
    if given["sparsity"] is not None:
        from fastsal.pruning.masks.shares import checked_sparsity

        given["sparsity"] = checked_sparsity(given["sparsity"])
    if given["floor"] is not None and not 0 <= given["floor"] <= 1:
        raise InvalidArgument(f"floor must be in [0, 1], got {given['floor']}")
    if given["pattern"] is not None and not finds_sparsity:
        from fastsal.pruning.masks.patterns import Pattern, check_given

        check_given(Pattern.parse(given["pattern"]), given["sparsity"])
    names = ("sparsity", "scope", "pattern", "floor")
    return {name: given[name] for name in names if given[name] is not None}
