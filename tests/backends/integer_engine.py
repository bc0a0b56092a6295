"""An INT8 engine of a runtime whose dialect writes plans into torch programs, and what it gives."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deploykit.backends.backend import resolve
from deploykit.backends.table import load_backend
from deploykit.calibration.plan import QuantizationPlan
from deploykit.onnx_session import onnx_session
from tests.calibration.conftest import Case
from tests.conftest_graphs import lower, made_once, manifest_of, open_engine, sqnr_db


@dataclass(frozen=True, kw_only=True)
class IntegerEngine:
    """The engine's file, the part of the case's plan that is in it, and what it gives for the case's images."""

    case: Case
    plan: QuantizationPlan
    file: Path
    outputs: list[np.ndarray]


def integer_engine(runtime: str, case: Case, name: str) -> IntegerEngine:
    """Render a case's plan in a runtime's dialect, write the engine and run it; ``name`` is that of the case."""
    dialect = resolve(load_backend(runtime).dialect)
    plan = dialect.keep_float(case.graph.model, case.plan)
    graph = dialect.render(case.program, plan, case.images).graph
    engine, folder = made_once(f"{runtime}-int8-{name}", lambda folder: lower(runtime, graph, folder))
    settings = {"reduce_range": plan.reduce_range}
    manifest = manifest_of(runtime, graph, engine, precision="int8", precision_settings=settings)
    with open_engine(manifest, folder) as model:
        runs = [model._run(image[None]) for image in case.images]
    outputs = [np.concatenate(parts) for parts in zip(*runs, strict=True)]
    return IntegerEngine(case=case, plan=plan, file=folder / engine.file, outputs=outputs)


def same_plan(engine: IntegerEngine) -> list[np.ndarray]:
    """Return what the engine's plan gives in ONNX Runtime, each node as it is written, for the case's images."""
    case = engine.case
    rendered = resolve(load_backend("onnxruntime").dialect).render(case.graph, engine.plan, case.images).graph
    session = onnx_session(rendered.model, optimize=False)
    runs = [session.run(None, {"images": image[None]}) for image in case.images]
    return [np.concatenate(parts) for parts in zip(*runs, strict=True)]


def losses(engine: IntegerEngine) -> list[float]:
    """How many dB each output has less than `same_plan`.

    Both are held against double precision: ONNX Runtime's float nodes round as its own FP32 does.
    """
    return [
        sqnr_db(expected, other) - sqnr_db(expected, own)
        for expected, other, own in zip(engine.case.exact(), same_plan(engine), engine.outputs, strict=True)
    ]
