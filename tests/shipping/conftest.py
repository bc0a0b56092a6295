"""A bundle to push."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.test_bundle import make


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    make(tmp_path / "bundle")
    return tmp_path / "bundle"


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder but what pulling adds, by name."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if not name.startswith(".cache/")}
