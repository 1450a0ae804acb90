"""The cells of a study: one per model, source, criterion, number of rounds, seed and sparsity."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastsal.study.folder_format import CELL
from fastsal.study.settings.schema import CriterionSettings, ModelSettings, SourceSettings, Study
from fastsal.utils.choices import CRITERION_NAMES, Curvature
from fastsal.utils.digests import Digest
from fastsal.utils.identity import identity_of

# Part of every key: results of another version are recomputed, not mixed.
ENGINE = 1


@dataclass(frozen=True)
class Cell:
    """One point of the grid of a study.

    Attributes:
        model: Model to prune.
        source: Source of the images that pruning sees.
        criterion: Pruning criterion.
        rounds: Number of pruning rounds.
        seed: Seed of the draw of images and of training.
        sparsity: Requested sparsity.
        key: Name of its file: a description, and a digest of everything that its results depend on.
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
        """Kind of statistics."""
        return self.criterion.curvature or self.source.curvature

    def facts(self) -> dict[str, Any]:
        """Return the columns `CELL` of tables, which identify a cell."""
        values = (
            self.key, self.model.name, self.source.name, self.criterion.name, self.rounds,
            self.sparsity, self.seed,
        )  # fmt: skip
        return dict(zip(CELL, values, strict=True))


def cells_of(study: Study, digests: Mapping[str, str] | None = None) -> list[Cell]:
    """List the cells of a study; cells that share statistics are adjacent.

    Args:
        study: Settings of the study.
        digests: `{file: digest}` of data and weights, which become part of the keys.
    """
    common = study.settings()
    for grid in ("name", "models", "sources", "criteria", "sparsities", "seeds", "rounds", "save"):
        del common[grid]

    def base(model: ModelSettings, criterion: CriterionSettings) -> dict[str, Any]:
        """What the cells of a model and a criterion depend on: not on other models or criteria."""
        own = {f"model {model.name}", f"criterion {criterion.criterion}"}
        files = {
            name: digest
            for name, digest in (digests or {}).items()
            if name in own or not name.startswith(("model ", "criterion "))
        }
        return {"engine": ENGINE, "study": common, "files": files}

    return [
        Cell(model, source, criterion, rounds, seed, sparsity, key)
        for model in study.models
        for source in study.sources
        for seed in study.seeds
        for criterion in study.criteria
        for rounds in criterion.rounds or study.rounds
        for sparsity in study.sparsities
        for key in [_key(base(model, criterion), model, source, criterion, rounds, seed, sparsity)]
    ]


def digests_of_criteria(study: Study) -> dict[str, str]:
    """Return `{criterion: digest}` of the code of criteria that are not built in."""
    from fastsal.pruning.criteria import CRITERIA

    names = {settings.criterion for settings in study.criteria} - set(CRITERION_NAMES)
    return {
        f"criterion {name}": identity_of(CRITERIA[name].compute)
        for name in sorted(names)
        if name in CRITERIA
    }


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
    digest = Digest().text(text).hexdigest()[:12]
    slug = "-".join(re.sub(r"[^A-Za-z0-9.]+", "_", word).strip("_") for word in words)
    # A hidden file would not be found among the results; "../model.py:function" is a name, too.
    return f"{slug.lstrip('.')[:120]}-{digest}"
