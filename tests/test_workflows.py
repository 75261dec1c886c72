"""What the workflow files and the commit hooks say agrees with the project's own files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = (ROOT / "pyproject.toml").read_text()
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def test_the_workflows_are_there() -> None:
    """Every change, every night, every release."""
    assert [path.stem for path in WORKFLOWS] == ["ci", "nightly", "release"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_actions_are_pinned_by_major_version(path: Path) -> None:
    """`name@v1` or `name@release/v1`: never a branch that moves under us."""
    used = re.findall(r"uses: (\S+)", path.read_text())
    assert used
    assert [name for name in used if not re.fullmatch(r"[\w/-]+@(release/)?v\d+", name)] == []


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_may_only_read(path: Path) -> None:
    """One job may do more: publishing proves by an identity token who it is."""
    text = path.read_text()
    assert text.count("permissions:\n  contents: read\n") == 1
    more = text.count("permissions:") - 1
    assert more == text.count("permissions:\n      id-token: write\n")
    assert more == (path.stem == "release")


def test_every_python_version_we_name_is_tried() -> None:
    """The matrix begins at `requires-python` and has every version of the classifiers."""
    matrix = re.search(r"python-version: \[(.*)\]", (WORKFLOWS[0]).read_text())
    lowest = re.search(r'^requires-python = ">=(.*)"', PROJECT, re.MULTILINE)
    assert matrix is not None and lowest is not None
    tried = re.findall(r'"([\d.]+)"', matrix[1])
    assert tried[0] == lowest[1]
    assert set(re.findall(r"Python :: (3\.\d+)", PROJECT)) <= set(tried)


def test_every_environment_that_a_workflow_runs_exists() -> None:
    """`tox run -e NAME` names sections of tox.ini."""
    sections = re.findall(r"^\[testenv:(.*)\]", (ROOT / "tox.ini").read_text(), re.MULTILINE)
    there = {name for section in sections for name in section.strip("{}").split(",")}
    for path in WORKFLOWS:
        for names in re.findall(r"tox run -e (\S+)", path.read_text()):
            assert set(names.split(",")) <= there


def test_commit_hooks_have_the_versions_of_the_project() -> None:
    """A hook judges as `tox -e lint,types` does, with no repository of its own."""
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    assert re.findall(r"repo: (\S+)", hooks) == ["local"]
    pins = set(re.findall(r"(?:ruff|mypy)==[\d.]+", PROJECT))
    assert set(re.findall(r"(?:ruff|mypy)==[\d.]+", hooks)) == pins
