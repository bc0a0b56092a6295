"""docs/support.md says what pyproject.toml, constraints.txt and the runtimes' descriptors say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from deploykit.backends.table import BACKENDS, load_backend

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "support.md").read_text(encoding="utf-8")
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
PINS = (ROOT / "constraints.txt").read_text(encoding="utf-8")


def rows(heading: str) -> dict[str, list[str]]:
    """The table under a heading: the first cell of each row to the others, without backticks."""
    part = TEXT[TEXT.index(f"## {heading}\n") :].partition("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("|")]
    cells = [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines[2:]]
    return {first: rest for first, *rest in cells}


def plain(name: str) -> str:
    return name.replace("-", "_").lower()


def oldest(package: str) -> str:
    """The least version that pyproject.toml allows, the same wherever it stands."""
    found = {version for name, version in re.findall(r'"([\w-]+)>=([\w.]+)"', PROJECT) if plain(name) == plain(package)}
    (version,) = found
    return version


def pinned(package: str) -> str:
    found = [version for name, version in re.findall(r"^([\w-]+)==(.+)$", PINS, re.MULTILINE) if plain(name) == package]
    (version,) = found
    return version


@pytest.mark.parametrize("heading", ["The build host", "The device"])
def test_packages_have_the_versions_of_the_settings(heading):
    table = rows(heading)
    assert len(table) >= 6
    assert table == {package: [oldest(package), pinned(plain(package))] for package in table}


def test_the_device_table_is_what_every_installation_and_the_command_bring():
    required = re.search(r"^dependencies = \[(.*?)^\]", PROJECT, re.DOTALL | re.MULTILINE)[1]
    required += re.search(r"^cli = \[(.*)\]$", PROJECT, re.MULTILINE)[1]
    assert list(rows("The device")) == re.findall(r'"([\w-]+)[><=]', required)


def test_runtimes_have_the_packages_and_precisions_of_their_descriptors():
    table = rows("Runtimes and precisions")
    assert list(table) == list(BACKENDS)
    for name, (package, least, version, precisions, opens) in table.items():
        backend = load_backend(name)
        assert plain(backend.package.distribution) == package
        assert (least, version) == (oldest(package), pinned(plain(package))), name
        assert precisions == ", ".join(backend.precisions), name
        expected = "newer" if backend.version_rule == "same_or_newer" else "exactly"
        assert (expected if backend.has_engines else "no engine") in opens, name


def test_the_readme_has_the_precisions_of_the_descriptors():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    said = {}
    for line in lines:
        if found := re.match(r"\| .* \| `pip install '\.\[(\w+)\]'` \| (.*) \|$", line):
            said.setdefault(found[1], []).append(set(re.findall(r"\w+\d+", found[2])))
    for name in BACKENDS:
        backend = load_backend(name)
        assert set(backend.precisions) in said[backend.package.extra], name


def test_python_is_what_the_project_asks_for():
    allowed = re.search(r'^requires-python = ">=([\d.]+)"', PROJECT, re.MULTILINE)[1]
    assert rows("Python and systems")["Python"][0] == f"{allowed} and newer"
