"""Read the settings of a study from TOML."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastsal.errors import InvalidArgument
from fastsal.study.settings.fields import Reader
from fastsal.study.settings.schema import (
    CORRUPTIONS,
    HEADS,
    SAVES,
    CriterionSettings,
    FinetuneSettings,
    LandscapeSettings,
    ModelSettings,
    SourceSettings,
    SplitSettings,
    Study,
    TaskSettings,
)
from fastsal.study.settings.toml_lines import read_toml
from fastsal.utils.choices import CURVATURES


def load_study(
    path: str | os.PathLike[str], *, root: str | os.PathLike[str] | None = None
) -> Study:
    """Read a study from a TOML file.

    Args:
        path: the file.
        root: the folder that data and weights are below; None takes the file's own `root`, which is
            below the file's folder, or that folder.

    Raises:
        InvalidArgument: an unknown key or a value that is not taken; says which key, in which line.
        FileFormatError: it is no TOML.
    """
    path = Path(path)
    table, lines = read_toml(path)
    return study_of(Reader(table, (), lines, path.name), path.absolute().parent, root)


def study_of(
    top: Reader, folder: Path = Path(), root: str | os.PathLike[str] | None = None
) -> Study:
    """Check settings and make a study of them; see `load_study`."""
    top.only(
        "name", "root", "sparsities", "seeds", "rounds", "samples", "block_size", "batch_size",
        "head", "ridge", "save", "models", "tasks", "sources", "criteria", "split", "finetune",
        "landscape",
    )  # fmt: skip
    own_root = folder / top.text("root", ".")
    tasks = _named(top, "tasks", _task)
    samples = top.optional_count("samples")
    sparsities, seeds = top.shares("sparsities"), top.counts("seeds", [0])
    return Study(
        name=top.text("name"),
        models=_named(top, "models", _model),
        tasks=tasks,
        sources=_named(top, "sources", lambda r: _source(r, [t.name for t in tasks], samples)),
        criteria=_named(top, "criteria", _criterion),
        sparsities=tuple(sorted(sparsities)),
        seeds=tuple(seeds),
        rounds=tuple(top.counts("rounds", [1], least=1)),
        block_size=top.count("block_size", 64),
        batch_size=top.count("batch_size", 64),
        head=top.choice("head", HEADS, "ridge"),
        ridge=top.number("ridge", 0.1, lambda v: v >= 0, "a number, 0 or more"),
        save=top.choice("save", SAVES, "none"),
        split=_split(top.within("split")),
        finetune=_finetune(top.within("finetune")) if "finetune" in top.table else None,
        landscape=(
            _landscape(top.within("landscape"), sparsities, seeds)
            if "landscape" in top.table
            else None
        ),
        root=Path(root).absolute() if root is not None else own_root,
        folder=folder,
    )


def _named(top: Reader, key: str, read: Any) -> tuple[Any, ...]:
    tables = top.tables(key)
    if not tables:
        raise top.error(key, f"is missing; takes one or more tables, [[{key}]]")
    found: list[Any] = []
    for reader in tables:
        item = read(reader)
        if item.name in [other.name for other in found]:
            raise reader.error("name", f"{item.name!r} stands twice in [[{key}]]")
        found.append(item)
    return tuple(found)


def _model(r: Reader) -> ModelSettings:
    r.only("name", "model", "weights", "num_classes", "in_chans", "size", "parameters")
    model = r.text("model")
    return ModelSettings(
        name=r.text("name", model),
        model=model,
        weights=r.optional_text("weights"),
        num_classes=r.optional_count("num_classes"),
        in_chans=r.optional_count("in_chans"),
        size=r.optional_count("size"),
        parameters=tuple(r.names("parameters")) if "parameters" in r.table else None,
    )


def _task(r: Reader) -> TaskSettings:
    r.only("name", "data", "test", "classes", "head", "images", "test_images")
    classes = r.table.get("classes")
    if classes is not None and (
        not isinstance(classes, list)
        or len(classes) < 2
        or not all(isinstance(c, (str, int)) and not isinstance(c, bool) for c in classes)
        or len(set(classes)) != len(classes)
    ):
        raise r.error("classes", f"got {classes!r}; takes two or more names or numbers, each once")
    return TaskSettings(
        name=r.text("name"),
        data=r.text("data"),
        test=r.optional_text("test"),
        classes=None if classes is None else tuple(classes),
        head=r.choice("head", HEADS, "") if "head" in r.table else None,
        images=r.optional_count("images"),
        test_images=r.optional_count("test_images"),
    )


def _source(r: Reader, tasks: list[str], samples: int | None) -> SourceSettings:
    r.only(
        "name", "tasks", "samples", "curvature", "corruption", "severity", "imbalance", "decay"
    )  # fmt: skip
    given = r.table.get("tasks")
    if isinstance(given, Mapping):
        weights = {
            name: r.within("tasks").number(name, None, lambda v: v > 0, "a weight above 0")
            for name in given
        }
    else:
        weights = dict.fromkeys(r.names("tasks"), 1.0)
    for name in weights:
        if name not in tasks:
            raise r.error("tasks", f"there is no task {name!r}; takes {', '.join(tasks)}")
    if not weights:
        raise r.error("tasks", "is empty; takes one or more tasks")
    decay = None
    if "decay" in r.table:
        decay = r.number("decay", None, lambda v: 0 < v <= 1, "a number above 0, to 1")
        if len(weights) < 2 or isinstance(given, Mapping):
            raise r.error("decay", "is for a list of two or more tasks, in the order they came")
    corruption = None
    if "corruption" in r.table:
        corruption = r.choice("corruption", CORRUPTIONS, "")
    severity = r.count("severity", 3)
    if severity > 5:
        raise r.error("severity", f"got {severity}; takes 1 to 5")
    return SourceSettings(
        name=r.text("name", " + ".join(weights)),
        tasks=weights,
        samples=r.optional_count("samples") or samples,
        curvature=r.choice("curvature", CURVATURES, "empirical"),
        corruption=corruption,
        severity=severity,
        imbalance=r.number("imbalance", 1.0, lambda v: 0 < v <= 1, "a ratio above 0, to 1"),
        decay=decay,
    )


def _criterion(r: Reader) -> CriterionSettings:
    from fastsal.pruning.criteria.registry import CRITERIA
    from fastsal.pruning.damping import parse_damping

    r.only(
        "name", "criterion", "compensate", "damping", "curvature", "rounds", "scope", "floor",
        "pattern",
    )  # fmt: skip
    criterion = r.choice("criterion", tuple(CRITERIA), "")
    compensate = r.flag("compensate", CRITERIA[criterion].needs_damping)
    damping: float | str = "auto"
    if "damping" in r.table:
        try:
            parsed = parse_damping(r.table["damping"], auto=True)
        except InvalidArgument as error:
            raise r.error("damping", str(error)) from None
        damping = parsed if isinstance(parsed, (str, float)) else str(parsed)
    # A criterion that goes with compensation by itself is called by its name alone.
    name = criterion
    if compensate != CRITERIA[criterion].needs_damping:
        name += " + compensation" if compensate else " alone"
    curvature = r.choice("curvature", CURVATURES, "empirical") if "curvature" in r.table else None
    if curvature is not None:
        name += f", {curvature}"
    rounds = tuple(r.counts("rounds", [1], least=1)) if "rounds" in r.table else None
    pattern = r.optional_text("pattern")
    if pattern is not None:
        from fastsal.pruning.masks.patterns import Pattern

        try:
            Pattern.parse(pattern)
        except InvalidArgument as error:
            raise r.error("pattern", str(error)) from None
        if rounds not in (None, (1,)):
            raise r.error("rounds", "takes 1 with a pattern")
        rounds = (1,)
    return CriterionSettings(
        name=r.text("name", name),
        criterion=criterion,
        compensate=compensate,
        damping=damping,
        curvature=curvature,
        rounds=rounds,
        scope=r.choice("scope", ("global", "layer", "erk"), "global"),
        floor=r.share("floor", 0.0),
        pattern=pattern,
    )


def _split(r: Reader) -> SplitSettings:
    r.only("prune", "fit", "tune", "test", "seed")
    own = SplitSettings()
    shares = {
        name: r.number(name, getattr(own, name), lambda v: 0 < v < 1, "a share between 0 and 1")
        for name in ("prune", "fit", "tune", "test")
    }
    total = shares["prune"] + shares["fit"] + shares["tune"]
    if abs(total - 1) > 1e-9:
        raise r.error(
            next(iter(r.table), "prune"), f"prune + fit + tune is {total:g}; takes a sum of 1"
        )
    return SplitSettings(**shares, seed=r.count("seed", 0, least=0))


def _finetune(r: Reader) -> FinetuneSettings:
    names = [f.name for f in dataclasses.fields(FinetuneSettings)]
    r.only(*names)
    held_out = r.number("held_out", 0.0, lambda v: 0 <= v < 1, "a share below 1")
    patience = r.optional_count("patience")
    if patience is not None and not held_out:
        raise r.error("patience", "is for held-out loss; give held_out as well")
    return FinetuneSettings(
        epochs=r.count("epochs", None),
        lr=r.number("lr", None, lambda v: v > 0, "a number above 0"),
        optimizer=r.text("optimizer", "sgd"),
        momentum=r.number("momentum", 0.9, lambda v: 0 <= v < 1, "a number from 0, below 1"),
        weight_decay=r.number("weight_decay", 0.0, lambda v: v >= 0, "a number, 0 or more"),
        schedule=r.choice("schedule", ("cosine", "linear", "constant"), "cosine"),
        images=r.optional_count("images"),
        held_out=held_out,
        patience=patience,
    )


def _landscape(r: Reader, sparsities: list[float], seeds: list[int]) -> LandscapeSettings:
    r.only("points", "sparsities", "seeds", "images", "eigenvectors", "samples")
    some = r.shares("sparsities") if "sparsities" in r.table else None
    few = r.counts("seeds", []) if "seeds" in r.table else None
    for key, chosen, all_of in (("sparsities", some, sparsities), ("seeds", few, seeds)):
        absent = [v for v in chosen or [] if v not in all_of]
        if absent:
            raise r.error(key, f"{absent[0]} is none of the study's; takes some of {all_of}")
    return LandscapeSettings(
        points=r.count("points", 9, least=2),
        sparsities=None if some is None else tuple(some),
        seeds=None if few is None else tuple(few),
        images=r.count("images", 500),
        eigenvectors=r.count("eigenvectors", 4),
        samples=r.count("samples", 256),
    )
