"""Criteria: one file for each family, one registry, and the function `score`.

A score estimates the loss increase from removing a weight; low scores are pruned first.
"""

from fastsal.pruning.criteria import block_fisher as _block_fisher
from fastsal.pruning.criteria import diagonal as _diagonal
from fastsal.pruning.criteria import obs_greedy as _obs_greedy
from fastsal.pruning.criteria import simple as _simple
from fastsal.pruning.criteria.registry import CRITERIA, Criterion, Inputs, criterion
from fastsal.pruning.criteria.scoring import score

del _block_fisher, _diagonal, _obs_greedy, _simple

__all__ = ["CRITERIA", "Criterion", "Inputs", "criterion", "score"]
