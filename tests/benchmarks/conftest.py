"""Scripts of benchmarks/ as modules, which find each other as they do when they run."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="session")
def script():
    """Import a script by its name; all are gone at the end, as are their names from the module table."""
    before = dict(sys.modules)
    own = {path.stem for path in BENCHMARKS.glob("*.py")}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module
        for name in own - before.keys():
            sys.modules.pop(name, None)


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """Let no script that silences warnings silence the tests that come after it."""
    before = logging.root.manager.disable
    yield
    logging.disable(before)
