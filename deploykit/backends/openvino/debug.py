"""Does OpenVINO fail on a part of a graph: does it refuse it, or compute it otherwise than ONNX defines it?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from deploykit.backends.onnx_file import write_onnx
from deploykit.backends.openvino.package import load_openvino
from deploykit.backends.openvino.read_error import REFUSALS, read_error
from deploykit.errors import ParityError
from deploykit.onnx_session import onnx_session
from deploykit.parity.runs import compare_runs
from deploykit.places import scratch_folder

if TYPE_CHECKING:
    import onnx_ir as ir

    from deploykit.onnx_session import Arrays


def find_problem(part: ir.Model, inputs: Arrays, min_sqnr_db: float) -> str | None:
    """Return what OpenVINO on the CPU does wrong with a part, on given values; None: nothing."""
    names = [str(value.name) for value in part.graph.outputs]
    expected = dict(zip(names, onnx_session(part, optimize=False).run(names, inputs), strict=True))
    try:
        found = dict(zip(names, run_part(part, inputs), strict=True))
    except REFUSALS as error:
        return f"it refuses it: {read_error(error)}"
    try:
        compare_runs({"onnx": expected, "openvino": found}, min_sqnr_db=min_sqnr_db)
    except ParityError as error:
        return str(error)
    return None


def run_part(part: ir.Model, inputs: Arrays) -> list[np.ndarray]:
    """Return what OpenVINO on the CPU gives for a part, output by output."""
    core = load_openvino().Core()
    with scratch_folder("debug") as folder:
        path = folder / "part.onnx"
        write_onnx(part, path)
        model = core.read_model(str(path))
        model.reshape({name: list(value.shape) for name, value in inputs.items()})
        compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        results = compiled(inputs)
    return [np.array(results[position]) for position in range(len(part.graph.outputs))]
