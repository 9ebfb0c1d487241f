"""Imports point one way, and importing the package costs next to nothing."""

import ast
import json
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import localdit

PACKAGE = Path(localdit.__file__).parent

# What the modules of a part may import of the package, their own part aside. `evaluation` times bare
# transformers, so it knows the models, and reads the settings that pictures carry; anybody may ask where the
# embedded pipeline lies.
MAY_IMPORT = {
    "assets": set(),
    "kernels": set(),
    "schedulers": set(),
    "data": set(),
    "models": {"kernels"},
    "pipelines": {"models", "schedulers"},
    "training": {"models", "schedulers", "data", "pipelines"},
    "evaluation": {"models", "pipelines", "data", "pictures"},
}
TOP = {"conversion", "inference", "cli", "demo"}  # may import anything; nobody imports them
FREE = {"assets", "_version", "files", "plots"}


def part_of(module: str) -> str:
    """`localdit.models.local_dit` belongs to `models`."""
    return module.split(".")[1]


def imports_of(source: str) -> Iterator[str]:
    """What of the package a source imports, at any depth. A lazy public name stands for its home."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            head, _, public = name.partition(".")
            if head == "localdit" and public:
                yield f"{localdit._HOMES[public]}.{public}" if public in localdit._HOMES else name


def forbidden(part: str, source: str) -> list[str]:
    """The imports of a source that its part of the package may not have."""
    if part in TOP:
        return []
    return [
        module
        for module in imports_of(source)
        if part_of(module) not in {part} | FREE | MAY_IMPORT[part] and part_of(module) != "__version__"
    ]


MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.stem in TOP)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    """No module imports a part of the package that stands above its own."""
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert part in MAY_IMPORT.keys() | TOP, f"{part} has no place in the order of imports yet"
    assert forbidden(part, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_triton_is_imported_when_it_is_used(path):
    """At the top of the kernels written in it alone, which nobody imports at the top."""
    names = []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append(str(node.module))
    assert "triton" in path.stem or not any("triton" in name for name in names)


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ("data", "import localdit.models.local_dit"),
        ("models", "def late():\n    from localdit.pipelines import local_dit"),
        ("models", "from localdit import LocalDiTPipeline"),
        ("training", "from localdit.conversion import convert"),
    ],
)
def test_the_rule_sees_what_breaks_it(part, source):
    assert len(forbidden(part, source)) == 1


def run_python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], check=True, capture_output=True, text=True, timeout=60
    ).stdout


def test_import_takes_under_50_ms():
    """The fastest of several Pythons that import the package, less the fastest that does not, in turns."""

    def seconds(code: str) -> float:
        start = time.perf_counter()
        run_python(code)
        return time.perf_counter() - start

    bare, importing = zip(*[(seconds("pass"), seconds("import localdit")) for _ in range(7)])
    assert min(importing) - min(bare) < 0.05


HEAVY = {"torch", "numpy", "diffusers", "transformers", "accelerate", "safetensors", "triton", "yaml", "PIL"}


@pytest.mark.parametrize(("module", "heavy"), [("localdit", HEAVY), ("localdit.cli", HEAVY - {"PIL"})])
def test_import_loads_nothing_heavy_and_opens_no_connection(module, heavy):
    loaded = json.loads(
        run_python(
            f"""
            import json, socket, sys

            def refuse(*args, **kwargs):
                raise AssertionError("a connection was opened")

            socket.socket.connect = socket.getaddrinfo = refuse
            before = set(sys.modules)
            import {module}
            print(json.dumps(sorted({{name.partition(".")[0] for name in set(sys.modules) - before}})))
            """
        )
    )
    assert "localdit" in loaded
    assert not heavy & set(loaded)


@pytest.mark.parametrize("name", localdit.__all__)
def test_every_public_name_is_found(name):
    assert getattr(localdit, name) is not None
    assert name in dir(localdit)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'LocalDiffusion'"):
        _ = localdit.LocalDiffusion
