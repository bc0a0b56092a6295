"""ONNX graph -> OpenVINO IR: ``model.xml`` and ``model.bin``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from deploykit.backends.backend import Engine, LowerOptions
from deploykit.backends.onnx_file import write_onnx
from deploykit.backends.openvino.package import PACKAGE, load_openvino
from deploykit.backends.openvino.protocols import Model, OpenVINOPackage, Shape
from deploykit.backends.openvino.read_error import REFUSALS, read_error
from deploykit.errors import ExportError
from deploykit.graph import OnnxGraph
from deploykit.optional import installed_version
from deploykit.places import scratch_folder
from deploykit.spec import HEIGHT_DIM, WIDTH_DIM, BatchRange, InputSpec

if TYPE_CHECKING:
    import onnx_ir as ir

_COUNTED_NAME = re.compile(r"[A-Z][A-Za-z0-9]*_\d+")  # such as ShapeOf_13


def lower(graph: OnnxGraph, folder: Path, options: LowerOptions) -> Engine:
    """Convert the ONNX model to an IR, weights uncompressed, batch bounded. The target decides nothing here.

    The same graph gives the same bytes.

    Raises:
        ExportError: ONNX's checker refuses the graph, or OpenVINO cannot convert it.
    """
    openvino = load_openvino()
    with scratch_folder("openvino") as staging:
        path = staging / "model.onnx"
        write_onnx(graph.model, path)
        try:
            model = openvino.Core().read_model(str(path))
            model.reshape({graph.input.name: _input_shape(openvino, graph.input)})
            _name_nodes_in_order(model, graph.model)
            openvino.save_model(model, str(folder / "model.xml"), compress_to_fp16=False)
        except REFUSALS as error:
            raise ExportError(
                f"OpenVINO {openvino.__version__} cannot convert the graph: {read_error(error)}. "
                "Export for another runtime, or with a newer openvino."
            ) from error
    return Engine(
        file="model.xml",
        runtime_version=installed_version("openvino", PACKAGE) or "unknown",
        tools={"onnx": installed_version("onnx") or "unknown", "openvino": str(openvino.__version__)},
    )


def _input_shape(openvino: OpenVINOPackage, spec: InputSpec) -> Shape:
    """Return the input's shape, with the bounds of a dynamic batch and of a range of sizes."""
    batch = spec.batch
    dimension = openvino.Dimension
    first = dimension(batch.min, batch.max) if isinstance(batch, BatchRange) else dimension(batch)
    bounds = {} if spec.sizes is None else dict(zip((HEIGHT_DIM, WIDTH_DIM), spec.sizes.sides, strict=True))
    rest = [
        dimension(bounds[side][0], bounds[side][2]) if isinstance(side, str) else dimension(side)
        for side in spec.shape[1:]
    ]
    return openvino.PartialShape([first, *rest])


def _name_nodes_in_order(model: Model, source: ir.Model) -> None:
    """Number the nodes that OpenVINO named from a counter of the process, so that the IR is reproducible."""
    given = {name for node in source.graph for name in (node.name, *(value.name for value in node.outputs))}
    given.update(source.graph.initializers)
    model.set_friendly_name("deploykit")
    for position, node in enumerate(model.get_ordered_ops()):
        name = node.get_friendly_name()
        if name not in given and _COUNTED_NAME.fullmatch(name):
            node.set_friendly_name(f"{node.get_type_name()}/{position}")
