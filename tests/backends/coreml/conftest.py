"""The INT8 package of a small residual network, which every fast test reads: a conversion takes seconds."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from deploykit.backends.backend import Engine
from deploykit.backends.coreml.package import PACKAGE_FOLDER
from deploykit.backends.coreml.passes import DIALECT
from deploykit.manifest import Manifest
from tests.calibration.conftest import Case
from tests.conftest_graphs import lower, manifest_of


@dataclasses.dataclass(frozen=True)
class Package:
    """A case, and the INT8 engine of its plan in a folder; ``half``: with the rest in float16."""

    case: Case
    folder: Path
    manifest: Manifest
    engine: Engine
    half: bool

    @property
    def path(self) -> Path:
        """The .mlpackage folder."""
        return self.folder / PACKAGE_FOLDER


def package_of(case: Case, folder: Path, *, half: bool) -> Package:
    plan = dataclasses.replace(case.plan, float_dtype="fp16" if half else "fp32")
    graph = DIALECT.render(case.program, plan, case.images).graph
    engine = lower("coreml", graph, folder)
    manifest = manifest_of("coreml", graph, engine)
    return Package(case=case, folder=folder, manifest=manifest, engine=engine, half=half)


@pytest.fixture(scope="session")
def residual_package(residual: Case, tmp_path_factory) -> Package:
    return package_of(residual, tmp_path_factory.mktemp("coreml"), half=False)
