"""What is installed, and the scripts that install it."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import localdit
from localdit.cli import main

REPOSITORY = Path(__file__).parents[1]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_the_installed_package_is_this_one():
    assert metadata.version("localdit") == localdit.__version__
    [script] = metadata.entry_points(group="console_scripts", name="localdit")
    assert script.load() is main


# It brings a torchvision that has to fit PyTorch's build; the tests put a small network in its place.
UNTESTED = ("torch-fidelity",)


def test_every_dependency_has_a_tested_version_that_is_allowed():
    lines = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    tested = {pin.name.lower(): str(pin.specifier).removeprefix("==") for pin in pins}
    extras = PROJECT["optional-dependencies"].values()
    for text in (*PROJECT["dependencies"], *(text for extra in extras for text in extra)):
        wanted = Requirement(text)
        if wanted.name not in ("localdit", *UNTESTED):  # an extra may hold another
            assert wanted.specifier.contains(tested[wanted.name.lower()]), text


def test_the_wheel_holds_every_module_the_types_and_the_model(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(
        REPOSITORY / "localdit", source / "localdit", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    [wheel] = tmp_path.glob("*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    files = {str(path.relative_to(source)) for path in (source / "localdit").rglob("*") if path.is_file()}
    assert "localdit/py.typed" in files
    assert files <= packed
    assert f"localdit-{localdit.__version__}.dist-info/licenses/LICENSE" in packed
    assert any(name.startswith("localdit/assets/mini/") for name in packed)


# --- .ci/install --------------------------------------------------------------------------------------------


NOTING = """#!/bin/sh
echo "$@" >> "$(dirname "$0")/asked"
case "$*" in *pip*) exit "$PIP_FAILS";; esac
"""


@pytest.fixture
def repository(tmp_path) -> Path:
    """The files that decide an installation, and an environment whose Python notes what it is asked to do."""
    for name in (".ci/install", "pyproject.toml", "constraints.txt", "localdit/_version.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(REPOSITORY / name, tmp_path / name)
    programs = tmp_path / "env/bin"
    programs.mkdir(parents=True)
    for name in ("python", "pip"):
        (programs / name).write_text(NOTING)
        (programs / name).chmod(0o755)
    return tmp_path


def install(repository: Path, *extra: str, pip_fails: int = 0) -> list[str]:
    """Run the script; the pip commands that it gave."""
    asked = repository / "env/bin/asked"
    asked.unlink(missing_ok=True)
    environment = os.environ | {"PIP_FAILS": str(pip_fails)}
    script = ["bash", str(repository / ".ci/install"), "env", *extra]
    run = subprocess.run(script, cwd=repository, env=environment, capture_output=True, check=False)
    assert (run.returncode != 0) == bool(pip_fails)
    return [line for line in asked.read_text().splitlines() if "pip" in line] if asked.exists() else []


def test_install_is_done_once(repository):
    assert install(repository) == ["-m pip install -c constraints.txt -e ."]
    assert install(repository) == []
    assert install(repository, "dev") == ["-m pip install -c constraints.txt -e .[dev]"]
    assert install(repository, "dev") == []


def test_install_with_the_tools_is_enough_for_users(repository):
    assert len(install(repository, "dev")) == 1
    assert install(repository) == []


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt", "localdit/_version.py"])
def test_install_is_done_again_when_what_decides_it_changes(repository, name):
    assert len(install(repository)) == 1
    with (repository / name).open("a") as file:
        file.write("# changed\n")
    assert len(install(repository)) == 1
    assert install(repository) == []


def test_an_install_that_failed_is_not_taken_for_done(repository):
    install(repository, pip_fails=1)
    assert len(install(repository)) == 1


@pytest.mark.parametrize("script", ["quickstart.sh", ".ci/run", ".ci/install"])
def test_scripts_can_be_run(script):
    assert os.access(REPOSITORY / script, os.X_OK)
    subprocess.run(["bash", "-n", REPOSITORY / script], check=True)
