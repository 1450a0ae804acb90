"""Provenance of a study: command, versions, machine and data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fastsal.study.report import wording
from fastsal.study.report.results import Results, in_order


def provenance(results: Results) -> list[tuple[str, str]]:
    """Return `(name, value)` of command, versions, machine, seeds and data, where known."""
    facts = results.facts
    machine, versions = _table(facts, "machine"), _table(facts, "versions")
    found = [
        ("command", str(facts.get("command") or "")),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
        ("machine", _machine(machine)),
        ("models", _models(results)),
        ("sources", ", ".join(in_order(r.source for r in results.rows))),
        ("calibration images", _counts(r.samples for r in results.rows)),
        ("tasks", ", ".join(_tasks(results))),
        ("seeds", ", ".join(str(s) for s in sorted({r.seed for r in results.rows}))),
        ("cells", _cells(results)),
        ("total time", f"{facts['seconds']:,.0f} s" if _number(facts.get("seconds")) else ""),
        ("fingerprint", str(facts.get("fingerprint") or "")),
    ]
    return [(name, value) for name, value in found if value]


def command(results: Results) -> str:
    """Return the command that reproduces the study; empty if unknown."""
    return str(results.facts.get("command") or "")


def settings_text(results: Results) -> str:
    """Return the settings of the study as indented JSON; empty if unknown."""
    return json.dumps(results.settings, indent=1, ensure_ascii=False) if results.settings else ""


def _table(facts: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = facts.get(name)
    return found if isinstance(found, Mapping) else {}


def _machine(machine: Mapping[str, Any]) -> str:
    parts = [str(machine["processor"])] if machine.get("processor") else []
    if _number(machine.get("threads")):
        parts.append(wording.number(machine["threads"], "thread"))
    if _number(machine.get("memory_bytes")):
        parts.append(f"{wording.size(machine['memory_bytes'])} memory")
    if machine.get("gpu"):
        parts.append(str(machine["gpu"]))
    if machine.get("system"):
        parts.append(str(machine["system"]))
    return ", ".join(parts)


def _models(results: Results) -> str:
    models = _table(results.facts, "models")
    texts = []
    for name in in_order(r.model for r in results.rows):
        known = models.get(name)
        text = name
        if isinstance(known, Mapping) and _number(known.get("prunable")):
            text += f" ({known['prunable']:,} prunable"
            text += f" of {known['weights']:,} weights)" if _number(known.get("weights")) else ")"
        texts.append(text)
    return ", ".join(texts)


def _tasks(results: Results) -> list[str]:
    texts = []
    for name in in_order(r.task for r in results.rows):
        row = next(r for r in results.rows if r.task == name)
        parts = [f"{row.head} head"] if row.head else []
        if row.classes:
            parts.append(wording.number(row.classes, "class", "classes"))
        if row.test_images:
            parts.append(wording.number(row.test_images, "test image"))
        texts.append(f"{name} ({', '.join(parts)})" if parts else name)
    return texts


def _cells(results: Results) -> str:
    done = len({r.cell for r in results.rows})
    failed = len(results.failures)
    return f"{done:,} finished" + (f", {failed:,} failed" if failed else "")


def _counts(values: Any) -> str:
    known = sorted({v for v in values if v})
    return ", ".join(f"{v:,}" for v in known)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
