"""Does TensorRT fail on a part of a graph: does it not build it?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from deploykit.backends.onnx_file import write_onnx
from deploykit.backends.tensorrt import api
from deploykit.backends.tensorrt.build import BuildSettings, build_plan
from deploykit.backends.tensorrt.legalize import quantize_layers
from deploykit.backends.tensorrt.lower import DEFAULT_CAPABILITY
from deploykit.errors import ExportError
from deploykit.optional import require
from deploykit.places import scratch_folder

if TYPE_CHECKING:
    import onnx_ir as ir

    from deploykit.onnx_session import Arrays


def find_problem(part: ir.Model, inputs: Arrays, min_sqnr_db: float) -> str | None:
    """Return the end of the build's log where a part does not build; None: it does. Nothing is run."""
    flavour = api.default_flavour()
    proto = require("onnx_ir").to_proto(part)
    settings = BuildSettings(
        flavour=flavour,
        input=str(part.graph.inputs[0].name),
        capability=DEFAULT_CAPABILITY if flavour == api.RTX else None,
        quantize_layers=quantize_layers(proto),
    )
    with scratch_folder("reduce") as scratch:
        file = scratch / "part.onnx"
        write_onnx(proto, file)
        try:
            build_plan(file, scratch / "part.plan", settings)
        except ExportError as error:
            return str(error)
    return None
