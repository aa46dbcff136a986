"""What the project's pages and settings say of the project is so."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib
import yaml

ROOT = Path(__file__).parents[1]
PAGES = ("CONTRIBUTING.md", "CHANGELOG.md", "examples/README.md")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text())


def recipe(target: str) -> list[str]:
    """The commands of a target of the Makefile; AssertionError if there is none."""
    rule = re.search(rf"^{re.escape(target)}:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.M)
    assert rule, f"the Makefile has no target {target}"
    return [line.strip() for line in rule[1].splitlines()]


def check_schema(name: str, path: str) -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{name}", str(ROOT / path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# ---------------------------------------------------------------------- CITATION.cff and CHANGELOG.md


def test_the_citation_is_valid():
    check_schema("citation-file-format", "CITATION.cff")


def test_the_citation_names_version_licence_and_authors_of_the_package_and_cites_the_paper():
    assert CITATION["version"] == PROJECT["version"]
    assert CITATION["license"] == PROJECT["license"]
    assert CITATION["authors"] == PROJECT["authors"]
    assert CITATION["preferred-citation"]["url"] == "https://arxiv.org/abs/2605.27747"


def test_the_changelog_begins_with_the_version_of_the_package():
    text = (ROOT / "CHANGELOG.md").read_text()
    newest = text.split("\n## ")[1]
    assert newest.startswith(("[Unreleased]", f"[{PROJECT['version']}]"))
    assert PROJECT["version"] in newest
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"^### (.*)$", text, re.M)) <= kinds


# ---------------------------------------------------------------------- the workflow and the hooks


def test_the_workflow_is_valid_and_runs_the_tests_and_the_docs_by_make():
    check_schema("github-workflows", ".github/workflows/test.yml")
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())
    commands = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    assert commands == ["make test", "make docs"]
    for command in commands:
        assert recipe(command.removeprefix("make "))


def test_the_hooks_run_the_checks_of_make_test_with_the_versions_of_the_constraints():
    path = ROOT / ".pre-commit-config.yaml"
    subprocess.run([sys.executable, "-m", "pre_commit", "validate-config", str(path)], check=True)
    repositories = yaml.safe_load(path.read_text())["repos"]
    # a repository of somebody else would bring versions of its own
    assert [repository["repo"] for repository in repositories] == ["local"]
    entries = [hook["entry"] for hook in repositories[0]["hooks"]]
    tool = re.compile(r"-m (ruff check|ruff format|mypy)")
    assert {hook["language"] for hook in repositories[0]["hooks"]} == {"system"}
    assert all(entry.startswith(".venv/bin/python -m ") for entry in entries)
    before_the_tests = [line for line in recipe("test") if "pytest" not in line]
    assert [tool.search(entry)[1] for entry in entries] == [tool.search(line)[1] for line in before_the_tests]
    pinned = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    assert {"ruff", "mypy"} <= pinned


# ---------------------------------------------------------------------- what the pages name


def commands(page: str) -> list[str]:
    """Every line of the blocks of code of a page."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S)
    return [line for block in blocks for line in block.splitlines()]


COMMANDS = commands("CONTRIBUTING.md")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_contributing_exists(command):
    program, *arguments = command.split()
    if program == "make":
        (target,) = arguments
        makefile = (ROOT / "Makefile").read_text()
        assert recipe(target) if "/" not in target else f"$(VENV)/{target.split('/')[1]}" in makefile
    elif arguments[:1] == ["-m"]:
        assert program == ".venv/bin/python"
        assert importlib.util.find_spec(arguments[1])
    else:
        name = program.removeprefix(".venv/bin/")
        assert name in importlib.metadata.entry_points(group="console_scripts").names
    for argument in arguments:
        if "/" in argument and program != "make":
            assert (ROOT / argument).exists()


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_a_page_links_or_names_exists(page):
    text = (ROOT / page).read_text()
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    assert [link for link in links if not (ROOT / page).parent.joinpath(link).exists()] == []
    named = re.findall(r"`((?:[\w-]+/)+[\w.-]*|\w+\.(?:toml|txt|md|cff))`", text)
    assert [name for name in named if not any((root / name).exists() for root in (ROOT, (ROOT / page).parent))] == []


def test_every_test_that_contributing_names_exists():
    names = re.findall(r"`(test_\w+)`", (ROOT / "CONTRIBUTING.md").read_text())
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert names
    assert [name for name in names if f"def {name}(" not in tests] == []


def test_what_contributing_says_is_in_a_file_is_there():
    named = re.findall(r"`(\w+)`\s+in\s+`([\w/]+\.py)`", (ROOT / "CONTRIBUTING.md").read_text())
    assert len(named) == 3
    for name, path in named:
        assert re.search(rf"^(def|class) {name}\b", (ROOT / path).read_text(), re.M), f"{name} is not in {path}"


def test_the_page_of_the_examples_lists_every_script_and_nothing_else():
    linked = re.findall(r"\]\(([\w/]+\.(?:py|ipynb))\)", (ROOT / "examples" / "README.md").read_text())
    package = ROOT / "examples" / "evidence"
    scripts = [path for kind in ("*.py", "*.ipynb") for path in (ROOT / "examples").rglob(kind)]
    scripts = [path for path in scripts if not path.is_relative_to(package)]
    scripts = [path for path in scripts if ".ipynb_checkpoints" not in path.parts]
    assert sorted(linked) == sorted(str(path.relative_to(ROOT / "examples")) for path in scripts)
    experiments = re.findall(r"\]\((\w+)/experiment\.py\)", (package / "README.md").read_text())
    assert sorted(experiments) == sorted(path.parent.name for path in package.glob("*/experiment.py"))
