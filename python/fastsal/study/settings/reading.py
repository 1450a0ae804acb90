"""Read and validate the settings of a study from TOML."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastsal.errors import InvalidArgument
from fastsal.study.settings.fields import Reader
from fastsal.study.settings.schema import (
    CriterionSettings,
    DiagnosticsSettings,
    FinetuneSettings,
    ModelSettings,
    RefitSettings,
    SourceSettings,
    SplitSettings,
    Study,
    TaskSettings,
)
from fastsal.study.settings.toml_lines import read_toml
from fastsal.utils.choices import (
    AUTOCAST_TYPES,
    CORRUPTION_KINDS,
    CRITERION_NAMES,
    CROP_MODES,
    CURVATURES,
    HEAD_KINDS,
    INTERPOLATIONS,
    REFIT_WINDOWS,
    SAVED,
    SCHEDULES,
    SCOPES,
    Autocast,
)
from fastsal.utils.devices import DEVICE_KINDS, is_device_name
from fastsal.utils.paths import user_path

_MOST_SEED = 2**63 - 1  # of a column of integers


def load_study(
    path: str | os.PathLike[str], *, root: str | os.PathLike[str] | None = None
) -> Study:
    """Read a study from a TOML file.

    Args:
        path: Path of the file.
        root: Folder that paths of data and weights are relative to; None uses the key `root` of
            the file, relative to its folder, or the folder itself.

    Raises:
        InvalidArgument: The file does not exist, a key is unknown, or a value is invalid; the
            message names the key and its line.
        FileFormatError: The file is not valid TOML.
    """
    path = user_path(path)
    table, lines = read_toml(path)
    return study_of(Reader(table, (), lines, path.name), path.absolute().parent, root)


def study_of(
    top: Reader,
    folder: str | os.PathLike[str] = "",
    root: str | os.PathLike[str] | None = None,
) -> Study:
    """Validate settings and return them as a study.

    Args:
        top: The top-level table.
        folder: Folder that paths of model files are relative to.
        root: Folder that paths of data and weights are relative to, as for `load_study`.

    Raises:
        InvalidArgument: A key is unknown or a value is invalid.
    """
    top.only(
        "name", "root", "sparsities", "seeds", "rounds", "samples", "block_size", "batch_size",
        "head", "ridge", "save", "device", "autocast", "models", "tasks", "sources",
        "criteria", "split", "finetune", "diagnostics",
    )  # fmt: skip
    own_root = Path(folder) / user_path(top.text("root", "."))
    tasks = _named(top, "tasks", _task)
    samples = top.optional_count("samples")
    sparsities, seeds = top.fractions("sparsities"), top.counts("seeds", [0], most=_MOST_SEED)
    models = _named(top, "models", _model)
    _register_criteria(top, models, folder)
    return Study(
        name=top.text("name"),
        models=models,
        tasks=tasks,
        sources=_named(top, "sources", lambda r: _source(r, [t.name for t in tasks], samples)),
        criteria=_named(top, "criteria", _criterion),
        sparsities=tuple(sorted(sparsities)),
        seeds=tuple(seeds),
        rounds=tuple(top.counts("rounds", [1], least=1)),
        block_size=top.count("block_size", 64),
        batch_size=top.count("batch_size", 64),
        head=top.choice("head", HEAD_KINDS, "ridge"),
        ridge=top.number("ridge", 0.1, least=0),
        save=top.choice("save", SAVED, "none"),
        device=_device(top),
        autocast=_autocast(top),
        split=_split(top.within("split")),
        finetune=_finetune(top.within("finetune")) if "finetune" in top.table else None,
        diagnostics=(
            _diagnostics(top.within("diagnostics"), sparsities, seeds)
            if "diagnostics" in top.table
            else None
        ),
        root=user_path(root).absolute() if root is not None else own_root,
        folder=Path(folder),
    )


def _device(top: Reader) -> str:
    device = top.text("device", "auto")
    if not is_device_name(device):
        raise top.error("device", f"must be {DEVICE_KINDS}, got {device!r}")
    return device


def _autocast(top: Reader) -> Autocast | None:
    key = "autocast"
    return top.choice(key, AUTOCAST_TYPES, None) if key in top.table else None


def _register_criteria(
    top: Reader, models: tuple[ModelSettings, ...], folder: str | os.PathLike[str]
) -> None:
    """Import the files of models if a criterion is not known, as they may register it."""
    from fastsal.models.loading import import_definition
    from fastsal.pruning.criteria import CRITERIA

    names = [reader.table.get("criterion") for reader in top.tables("criteria")]
    if all(name in CRITERIA for name in names if isinstance(name, str)):
        return
    for settings in models:
        import_definition(settings.model, folder)


def _named(top: Reader, key: str, read: Any) -> tuple[Any, ...]:
    tables = top.tables(key)
    if not tables:
        raise top.error(key, f"is missing; at least one table [[{key}]] is required")
    found: list[Any] = []
    for reader in tables:
        item = read(reader)
        if item.name in [other.name for other in found]:
            raise reader.error("name", f"must be unique in [[{key}]], got {item.name!r} twice")
        found.append(item)
    return tuple(found)


def _model(r: Reader) -> ModelSettings:
    r.only(
        "name", "model", "weights", "weights_key", "num_classes", "in_chans", "size", "crop_pct",
        "crop_mode", "interpolation", "parameters",
    )  # fmt: skip
    of = r.table
    model = r.text("model")
    return ModelSettings(
        name=r.text("name", model),
        model=model,
        weights=r.optional_text("weights"),
        weights_key=r.optional_text("weights_key"),
        num_classes=r.optional_count("num_classes", least=0),
        in_chans=r.optional_count("in_chans"),
        size=r.optional_count("size"),
        crop_pct=r.number("crop_pct", None, above=0, most=1) if "crop_pct" in of else None,
        crop_mode=r.choice("crop_mode", CROP_MODES, None) if "crop_mode" in of else None,
        interpolation=(
            r.choice("interpolation", INTERPOLATIONS, None) if "interpolation" in of else None
        ),
        parameters=tuple(r.names("parameters")) if "parameters" in of else None,
    )


def _task(r: Reader) -> TaskSettings:
    r.only("name", "data", "test", "classes", "head", "images", "test_images", "class_map")
    classes = r.table.get("classes")
    if classes is not None and (
        not isinstance(classes, list)
        or len(classes) < 2
        or not all(isinstance(c, (str, int)) and not isinstance(c, bool) for c in classes)
        or len(set(classes)) != len(classes)
    ):
        raise r.error("classes", f"must be two or more distinct names or indices, got {classes!r}")
    class_map = r.table.get("class_map")
    if isinstance(class_map, Mapping):
        inner = r.within("class_map")
        class_map = {name: inner.count(name, None, least=0) for name in class_map}
    elif class_map is not None:
        class_map = r.text("class_map")
    return TaskSettings(
        name=r.text("name"),
        data=r.text("data"),
        test=r.optional_text("test"),
        classes=None if classes is None else tuple(classes),
        head=r.choice("head", HEAD_KINDS, None) if "head" in r.table else None,
        images=r.optional_count("images"),
        test_images=r.optional_count("test_images"),
        class_map=class_map,
    )


def _source(r: Reader, tasks: list[str], samples: int | None) -> SourceSettings:
    r.only(
        "name", "tasks", "samples", "curvature", "corruption", "severity", "imbalance", "decay"
    )  # fmt: skip
    given = r.table.get("tasks")
    if isinstance(given, Mapping):
        weights = {name: r.within("tasks").number(name, None, above=0) for name in given}
    else:
        weights = dict.fromkeys(r.names("tasks"), 1.0)
    for name in weights:
        if name not in tasks:
            raise r.error("tasks", f"must be among {', '.join(tasks)}, got {name!r}")
    if not weights:
        raise r.error("tasks", "must hold at least one task")
    decay = None
    if "decay" in r.table:
        decay = r.number("decay", None, above=0, most=1)
        if len(weights) < 2 or isinstance(given, Mapping):
            raise r.error("decay", "requires a list of two or more tasks, in order of arrival")
    corruption = None
    if "corruption" in r.table:
        corruption = r.choice("corruption", CORRUPTION_KINDS, None)
    return SourceSettings(
        name=r.text("name", " + ".join(weights)),
        tasks=weights,
        samples=r.optional_count("samples") or samples,
        curvature=r.choice("curvature", CURVATURES, "empirical"),
        corruption=corruption,
        severity=r.count("severity", 3, most=5),
        imbalance=r.number("imbalance", 1.0, above=0, most=1),
        decay=decay,
    )


def _criterion(r: Reader) -> CriterionSettings:
    from fastsal.pruning.criteria import CRITERIA
    from fastsal.pruning.damping import parse_damping

    r.only(
        "name", "criterion", "compensate", "damping", "curvature", "rounds", "scope", "floor",
        "pattern", "reconstruct", "refit",
    )  # fmt: skip
    criterion = r.choice("criterion", list(dict.fromkeys((*CRITERION_NAMES, *CRITERIA))), None)
    compensate = r.flag("compensate", CRITERIA[criterion].needs_damping)
    damping: float | str = "auto"
    if "damping" in r.table:
        try:
            parsed = parse_damping(r.table["damping"], auto=True)
        except InvalidArgument as error:
            raise r.error("damping", str(error).removeprefix("damping ")) from None
        damping = parsed if isinstance(parsed, (str, float)) else str(parsed)
    # The name mentions compensation only where it differs from the default of the criterion.
    name: str = criterion
    if compensate != CRITERIA[criterion].needs_damping:
        name += " + compensation" if compensate else " alone"
    curvature = r.choice("curvature", CURVATURES, "empirical") if "curvature" in r.table else None
    if curvature is not None:
        name += f", {curvature}"
    rounds = tuple(r.counts("rounds", [1], least=1)) if "rounds" in r.table else None
    reconstruct = r.flag("reconstruct", False)
    if reconstruct:
        name += ", reconstructed"
    refit = _refit(r)
    pattern = r.optional_text("pattern")
    if pattern is not None:
        from fastsal.pruning.masks.patterns import Pattern

        try:
            Pattern.parse(pattern)
        except InvalidArgument as error:
            raise r.error("pattern", f"is invalid ({error})") from None
        if rounds not in (None, (1,)):
            raise r.error("rounds", f"must be [1] with a pattern, got {list(rounds or [])}")
        rounds = (1,)
    return CriterionSettings(
        name=r.text("name", name if refit is None else name + ", refit"),
        criterion=criterion,
        compensate=compensate,
        damping=damping,
        curvature=curvature,
        rounds=rounds,
        scope=r.choice("scope", SCOPES, "global"),
        floor=r.number("floor", 0.0, least=0, most=1),
        pattern=pattern,
        reconstruct=reconstruct,
        refit=refit,
    )


def _refit(r: Reader) -> RefitSettings | None:
    """Return the settings of refitting: windows, or a table; None if they are absent."""
    if "refit" not in r.table:
        return None
    own = RefitSettings()
    if isinstance(r.table["refit"], str):
        return RefitSettings(r.choice("refit", REFIT_WINDOWS, None))
    within = r.within("refit")
    within.only("windows", "steps", "batch_size", "lr", "between_rounds")
    return RefitSettings(
        windows=within.choice("windows", REFIT_WINDOWS, own.windows),
        steps=within.count("steps", 1) if "steps" in within.table else None,
        batch_size=within.count("batch_size", own.batch_size),
        lr=within.number("lr", None, above=0) if "lr" in within.table else None,
        between_rounds=within.flag("between_rounds", own.between_rounds),
    )


def _split(r: Reader) -> SplitSettings:
    r.only("prune", "fit", "tune", "test", "seed")
    own = SplitSettings()
    names = [f.name for f in dataclasses.fields(own) if f.name != "seed"]
    shares = {name: r.number(name, getattr(own, name), above=0, below=1) for name in names}
    total = shares["prune"] + shares["fit"] + shares["tune"]
    if abs(total - 1) > 1e-9:
        raise r.error(
            next(iter(r.table), "prune"),
            f"must make prune + fit + tune = 1, got a sum of {total:g}",
        )
    return SplitSettings(**shares, seed=r.count("seed", 0, least=0, most=_MOST_SEED))


def _finetune(r: Reader) -> FinetuneSettings:
    names = [f.name for f in dataclasses.fields(FinetuneSettings)]
    r.only(*names)
    held_out = r.number("held_out", 0.0, least=0, below=1)
    patience = r.optional_count("patience")
    if patience is not None and not held_out:
        raise r.error("patience", "requires held_out")
    return FinetuneSettings(
        epochs=r.count("epochs", None),
        lr=r.number("lr", None, above=0),
        optimizer=r.text("optimizer", "sgd"),
        momentum=r.number("momentum", 0.9, least=0, below=1),
        weight_decay=r.number("weight_decay", 0.0, least=0),
        schedule=r.choice("schedule", SCHEDULES, "cosine"),
        images=r.optional_count("images"),
        held_out=held_out,
        patience=patience,
    )


def _diagnostics(r: Reader, sparsities: list[float], seeds: list[int]) -> DiagnosticsSettings:
    r.only("points", "sparsities", "seeds", "images", "eigenvectors", "samples")
    some = r.fractions("sparsities") if "sparsities" in r.table else None
    few = r.counts("seeds", []) if "seeds" in r.table else None
    for key, chosen, all_of in (("sparsities", some, sparsities), ("seeds", few, seeds)):
        absent = [v for v in chosen or [] if v not in all_of]
        if absent:
            raise r.error(key, f"must be among the study's {all_of}, got {absent[0]}")
    return DiagnosticsSettings(
        points=r.count("points", 9, least=2),
        sparsities=None if some is None else tuple(some),
        seeds=None if few is None else tuple(few),
        images=r.count("images", 500),
        eigenvectors=r.count("eigenvectors", 4),
        samples=r.count("samples", 256),
    )
