"""Does ONNX Runtime fail on a part of a graph: does it refuse it, or compute it otherwise than node by node?"""

from __future__ import annotations

import onnx_ir as ir

from deploykit.arrays import Array
from deploykit.backends.onnxruntime.session import ort_session
from deploykit.errors import ParityError
from deploykit.onnx_session import Arrays
from deploykit.parity.runs import compare_runs


def find_problem(part: ir.Model, inputs: Arrays, min_sqnr_db: float) -> str | None:
    """Return what the optimized session does wrong with a part, on given values; None: nothing."""
    names = [str(value.name) for value in part.graph.outputs]
    expected = dict(zip(names, ort_session(part, optimize=False).run(names, inputs), strict=True))
    try:
        found = dict(zip(names, run_part(part, inputs), strict=True))
    except Exception as error:  # onnxruntime's classes share no base
        return f"the runtime refuses it: {error}"
    try:
        compare_runs({"as written": expected, "optimized": found}, min_sqnr_db=min_sqnr_db)
    except ParityError as error:
        return str(error)
    return None


def run_part(part: ir.Model, inputs: Arrays) -> list[Array]:
    """Return what the optimized session gives for a part, output by output."""
    return ort_session(part).run([str(value.name) for value in part.graph.outputs], inputs)
