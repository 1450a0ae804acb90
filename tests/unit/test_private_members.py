"""Private members of a class are used in its own module alone."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "python" / "fastsal"
FOLDERS = [folder for name in ("tests", "benches") if (folder := ROOT / name).is_dir()]


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


def is_own(node):
    """Whether an attribute is that of `self` or `cls`."""
    return isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")


def private_members(tree):
    """Private methods, fields and attributes of the classes of a module."""
    found = set()
    for kind in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
        for node in ast.walk(kind):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                found.add(node.name)
            elif isinstance(node, ast.Attribute) and is_own(node):
                found.add(node.attr)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found.add(node.target.id)
    return {name for name in found if is_private(name)}


def imported_modules(tree):
    """Names under which a module imports others."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {name.asname or name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            folder = ROOT / "python" / node.module.replace(".", "/")
            files = [name for name in node.names if (folder / f"{name.name}.py").is_file()]
            found |= {name.asname or name.name for name in files}
    return found


def uses(tree):
    """Private attributes of something else than `self`, `cls` and modules, with their lines."""
    modules = imported_modules(tree)
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Attribute) and is_private(node.attr)) or is_own(node):
            continue
        if not (isinstance(node.value, ast.Name) and node.value.id in modules):
            yield node.attr, node.lineno


def parsed(folder):
    return {path: ast.parse(path.read_text("utf-8")) for path in sorted(folder.rglob("*.py"))}


@pytest.fixture(scope="module")
def modules():
    return parsed(PACKAGE)


def test_no_module_uses_private_members_of_another(modules):
    members = {path: private_members(tree) for path, tree in modules.items()}
    # Names that no class of the package has belong to Python, NumPy or PyTorch.
    every = set().union(*members.values()) - vars(nn.Module()).keys()
    others = {path: tree for folder in FOLDERS for path, tree in parsed(folder).items()}
    found = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path, tree in {**modules, **others}.items()
        for name, line in uses(tree)
        if name in every - members.get(path, set())
    ]
    assert found == []


def test_fisher_exports_no_private_names(modules):
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {name.name}"
        for path, tree in modules.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fastsal.fisher")
        for name in node.names
        if is_private(name.name)
    ]
    assert found == []


def test_uses_are_found():
    tree = ast.parse(
        "class A:\n    _b: int\n\n    def c(self, a):\n        return self._b + a._d._e\n"
    )
    assert private_members(tree) == {"_b"}
    assert {name for name, _ in uses(tree)} == {"_d", "_e"}
