import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def _packages_on_disk() -> set[str]:
    """Every folder with sources, by the name it is imported under."""
    found = {"jaxengine.models", "jaxengine.pallas_kernels"}
    for source in (ROOT / "jaxengine").rglob("*.py"):
        parts = source.parent.relative_to(ROOT).parts
        if not {"models", "pallas_kernels"} & set(parts):
            found.add(".".join(parts))
    return found


def test_the_package_list_equals_the_folders_with_sources(project: dict[str, Any]) -> None:
    listed = project["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(_packages_on_disk())


@pytest.mark.parametrize("name", ["models", "pallas_kernels"])
def test_the_folders_beside_the_package_are_flat_and_linked_into_it(name: str) -> None:
    link = ROOT / "jaxengine" / name
    assert link.is_symlink() and str(link.readlink()) == f"../{name}"
    assert list((ROOT / name).rglob("*.py")) == list((ROOT / name).glob("*.py"))


def test_every_package_is_a_regular_one() -> None:
    for package in _packages_on_disk():
        assert (ROOT / package.replace(".", "/") / "__init__.py").is_file(), package


def test_every_data_file_of_the_package_is_shipped(project: dict[str, Any]) -> None:
    package = ROOT / "jaxengine"
    patterns = project["tool"]["setuptools"]["package-data"]["jaxengine"]
    shipped = {path for pattern in patterns for path in package.glob(pattern) if path.is_file()}
    wanted = {path for path in (package / "assets").rglob("*") if path.is_file()}
    wanted |= set((package / "bench").glob("*.json"))
    assert wanted <= shipped and package / "py.typed" in shipped


def test_what_every_checkout_needs_is_there(project: dict[str, Any]) -> None:
    metadata = project["project"]
    for name in (metadata["readme"], *metadata["license-files"], "CHANGELOG.md", "Makefile"):
        assert (ROOT / name).is_file(), name


def test_import_is_quick_and_loads_nothing_heavy() -> None:
    program = """
import sys, time
start = time.perf_counter()
import jaxengine
print(time.perf_counter() - start)
print([name for name in ("jax", "flax", "torch", "transformers") if name in sys.modules])
"""
    seconds = []
    for _ in range(3):  # the first may compile bytecode
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        elapsed, loaded = done.stdout.splitlines()
        assert loaded == "[]"
        seconds.append(float(elapsed))
    assert min(seconds) < 1
