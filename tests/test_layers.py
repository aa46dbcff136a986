"""The house is built as its plan says: imports go down only, and what a package offers stands in its __init__.pyi.

The plan itself, the order of the packages, stands in pyproject.toml and is read by import-linter.
`python -m tests.test_layers` prints which package imports which.
"""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[1]
ENGINE = ROOT / "renyi_engine"
PACKAGES = sorted(path.parent.name for path in ENGINE.glob("*/__init__.py"))


def offered(package: str) -> set[str]:
    """The names in a package's __init__.pyi."""
    tree = ast.parse((ENGINE / package / "__init__.pyi").read_text())
    return {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}


def imports(file: Path) -> Iterator[tuple[str, str]]:
    """(module, name) of everything that a file imports from the engine, at its top or inside a function."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("renyi_engine."):
            yield from ((node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names if alias.name.startswith("renyi_engine."))


def package_imports() -> dict[str, set[str]]:
    """Which part of the engine, a package or a single file, imports which; imports for type checking count too."""
    graph = grimp.build_graph("renyi_engine", "renyi_kernels", include_external_packages=False, cache_dir=None)

    def part(module: str) -> str:
        return module.split(".")[1] if module.startswith("renyi_engine.") else module.split(".")[0]

    found: dict[str, set[str]] = {}
    for module in graph.modules:
        if module.startswith("renyi_engine."):
            targets = {part(name) for name in graph.find_modules_directly_imported_by(module)}
            found.setdefault(part(module), set()).update(targets - {part(module)})
    return found


def test_imports_go_down_and_never_in_a_circle():
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache", "--no-logo"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "BROKEN" not in done.stdout


def test_the_linter_sees_imports_for_type_checking():
    graph = grimp.build_graph("renyi_engine", cache_dir=None, include_external_packages=True)
    assert "torch" in graph.find_modules_directly_imported_by("renyi_engine.core.memory")


@pytest.mark.parametrize("package", PACKAGES)
def test_other_packages_use_only_what_a_package_offers(package):
    files = [path for folder in (ENGINE, ROOT / "examples") for path in folder.rglob("*.py")]
    others = [file for file in files if not file.is_relative_to(ENGINE / package)]
    prefix = f"renyi_engine.{package}"
    used = {name for file in others for module, name in imports(file) if module == prefix}
    inside = {
        (str(file.relative_to(ROOT)), module)
        for file in others
        for module, _ in imports(file)
        if module.startswith(f"{prefix}.")
    }
    assert used <= offered(package)
    assert inside == set(), "import from the package, not from a file inside it"


def test_nothing_is_imported_in_a_way_that_the_tests_above_do_not_see():
    """That is a relative import, or one through renyi_engine itself, which hands out the names of every layer."""
    files = {path.stem for path in ENGINE.glob("*.py")}
    unseen = [
        (str(path.relative_to(ROOT)), node.lineno)
        for path in ENGINE.rglob("*.py")
        if path.name != "cli.py"  # it stands on top, and asks for the version
        for node in ast.walk(ast.parse(path.read_text()))
        if (isinstance(node, ast.Import) and any(alias.name == "renyi_engine" for alias in node.names))
        or (isinstance(node, ast.ImportFrom) and node.level > 0)
        or (
            isinstance(node, ast.ImportFrom)
            and node.module == "renyi_engine"
            and any(alias.name not in files for alias in node.names)
        )
    ]
    assert unseen == []


@pytest.mark.parametrize("package", ["", *PACKAGES])
def test_everything_offered_is_there(package):
    module = importlib.import_module(f"renyi_engine.{package}".rstrip("."))
    names = offered(package)
    assert names == set(module.__all__)
    for name in names:
        assert getattr(module, name) is not None
        assert name in dir(module)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_says_what_it_is_for(package):
    assert (importlib.import_module(f"renyi_engine.{package}").__doc__ or "").strip().endswith(".")


if __name__ == "__main__":
    for name, imported in sorted(package_imports().items()):
        print(f"{name:15} -> {', '.join(sorted(imported))}")
