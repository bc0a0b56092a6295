"""QNN engines of small networks, for the Snapdragon 8 Gen 3, which the simulator here runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from deploykit.backends.backend import Engine, LowerOptions
from deploykit.backends.onnxruntime.qnn.adapter import QnnRuntime
from deploykit.backends.onnxruntime.qnn.lower import lower
from deploykit.backends.onnxruntime.qnn.package import SIMULATOR
from deploykit.backends.onnxruntime.qnn.passes import DIALECT
from deploykit.calibration.half import HalfPlan
from deploykit.calibration.precision_plan import PrecisionPlan
from deploykit.graph import OnnxGraph
from deploykit.manifest import Manifest
from deploykit.processor import this_machine
from deploykit.target import targets
from tests.calibration.conftest import Case
from tests.conftest_graphs import manifest_of

TARGET = targets()["qualcomm-snapdragon-8-gen-3"]
SOC = TARGET.runtime[0].options
OPTIONS = LowerOptions(settings=SOC)

on_x86 = pytest.mark.skipif(this_machine() != "x86_64", reason="the simulator of the NPU is for x86-64")


@dataclasses.dataclass(frozen=True)
class QnnEngine:
    """A case, its graph in one precision, and the engine of that in a folder."""

    case: Case
    graph: OnnxGraph
    folder: Path
    manifest: Manifest
    engine: Engine

    @property
    def path(self) -> Path:
        """The ONNX file."""
        return self.folder / self.engine.file

    def open(self, device: str = SIMULATOR, **changes: object) -> QnnRuntime:
        return QnnRuntime(dataclasses.replace(self.manifest, **changes), self.folder, device=device, trust=True)


def engine_of(case: Case, plan: PrecisionPlan, folder: Path, precision: str) -> QnnEngine:
    pytest.importorskip("onnxruntime_qnn", reason="onnxruntime-qnn is not installed")
    graph = DIALECT.render(case.graph, plan, case.images).graph
    engine = lower(graph, folder, OPTIONS)
    from deploykit.manifest import MadeFor

    choice = TARGET.runtime[0]
    made_for = MadeFor(name=TARGET.name, title=TARGET.title, device=choice.device, options=choice.options)
    manifest = manifest_of("onnxruntime", graph, engine, precision=precision, made_for=made_for, tools=engine.tools)
    return QnnEngine(case=case, graph=graph, folder=folder, manifest=manifest, engine=engine)


def half_of(plan):
    return dataclasses.replace(plan, float_dtype="fp16")


@pytest.fixture(scope="session")
def residual_engine(residual: Case, tmp_path_factory) -> QnnEngine:
    return engine_of(residual, half_of(residual.plan), tmp_path_factory.mktemp("qnn"), "int8")


@pytest.fixture(scope="session")
def tokens_engine(tokens: Case, tmp_path_factory) -> QnnEngine:
    return engine_of(tokens, half_of(tokens.plan), tmp_path_factory.mktemp("qnn"), "int8")


@pytest.fixture(scope="session")
def half_engine(residual: Case, tmp_path_factory) -> QnnEngine:
    return engine_of(residual, HalfPlan(float_weights={}), tmp_path_factory.mktemp("qnn"), "fp16")


@pytest.fixture(scope="session")
def windows_engine(windows: Case, tmp_path_factory) -> QnnEngine:
    return engine_of(windows, half_of(windows.plan), tmp_path_factory.mktemp("qnn"), "int8")


@pytest.fixture(scope="session")
def half_windows_engine(windows: Case, tmp_path_factory) -> QnnEngine:
    return engine_of(windows, HalfPlan(float_weights={}), tmp_path_factory.mktemp("qnn"), "fp16")
