"""The grid of a study: one cell a model, source, criterion, number of rounds, seed and sparsity."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastsal.study.settings.schema import CriterionSettings, ModelSettings, SourceSettings, Study
from fastsal.utils.choices import Curvature

# Rows made by another version of the engine are not mixed with these.
ENGINE = 1


@dataclass(frozen=True)
class Cell:
    """One point of the grid.

    Attributes:
        model: what is pruned.
        source: what pruning sees.
        criterion: how.
        rounds: in so many.
        seed: of the draw of images and of training.
        sparsity: asked for.
        key: of its file: what it is in words, and a digest of all that its numbers depend on.
    """

    model: ModelSettings
    source: SourceSettings
    criterion: CriterionSettings
    rounds: int
    seed: int
    sparsity: float
    key: str

    @property
    def curvature(self) -> Curvature:
        """Curvature of the statistics."""
        return self.criterion.curvature or self.source.curvature

    def facts(self) -> dict[str, Any]:
        """Return the columns that say which cell it is."""
        return {
            "cell": self.key,
            "model": self.model.name,
            "source": self.source.name,
            "criterion": self.criterion.name,
            "rounds": self.rounds,
            "sparsity": self.sparsity,
            "seed": self.seed,
        }


def cells_of(study: Study, digests: Mapping[str, str] | None = None) -> list[Cell]:
    """List the cells of a study, those that share statistics one after another.

    Args:
        study: its settings.
        digests: `{file: digest}` of the data and weights, so that other contents are other cells.
    """
    common = study.settings()
    for grid in ("name", "models", "sources", "criteria", "sparsities", "seeds", "rounds", "save"):
        del common[grid]
    base = {"engine": ENGINE, "study": common, "files": dict(digests or {})}
    return [
        Cell(model, source, criterion, rounds, seed, sparsity, key)
        for model in study.models
        for source in study.sources
        for seed in study.seeds
        for criterion in study.criteria
        for rounds in criterion.rounds or study.rounds
        for sparsity in study.sparsities
        for key in [_key(base, model, source, criterion, rounds, seed, sparsity)]
    ]


def _key(
    base: Mapping[str, Any],
    model: ModelSettings,
    source: SourceSettings,
    criterion: CriterionSettings,
    rounds: int,
    seed: int,
    sparsity: float,
) -> str:
    words = [model.name, source.name, criterion.name, f"r{rounds}", f"s{seed}", f"{sparsity:g}"]
    settings = [dataclasses.asdict(part) for part in (model, source, criterion)]
    plain = [*settings, rounds, seed, sparsity]
    text = json.dumps([base, plain], sort_keys=True, default=list)
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    slug = "-".join(re.sub(r"[^A-Za-z0-9.]+", "_", word).strip("_") for word in words)
    return f"{slug[:120]}-{digest}"
