"""Graph -> OpenVINO IR: ``model.xml`` and ``model.bin``."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploykit.errors import ExportError
from deploykit.export.lowering import Engine, Graph
from deploykit.export.onnx_file import model_of, write_onnx
from deploykit.optional import installed_version, require
from deploykit.spec import BatchRange, InputSpec

if TYPE_CHECKING:
    import onnx

_COUNTED_NAME = re.compile(r"[A-Z][A-Za-z0-9]*_\d+")  # such as ShapeOf_13


def to_openvino(graph: Graph, folder: Path, *, target: str | None = None) -> Engine:
    """Convert the ONNX model to an IR, weights uncompressed, batch bounded. ``target`` decides nothing here.

    The same graph gives the same bytes.

    Raises:
        ExportError: the graph has no ONNX model, ONNX's checker refuses it, or OpenVINO cannot convert it.
    """
    openvino = require("openvino")
    source = model_of(graph, "openvino")
    with tempfile.TemporaryDirectory(prefix="deploykit-openvino-") as staging:
        path = Path(staging) / "model.onnx"
        write_onnx(source, path)
        try:
            model = openvino.Core().read_model(str(path))
            model.reshape({graph.input.name: _input_shape(openvino, graph.input)})
            _name_nodes_in_order(model, source)
            openvino.save_model(model, str(folder / "model.xml"), compress_to_fp16=False)
        except RuntimeError as error:
            raise ExportError(
                f"OpenVINO {openvino.__version__} cannot convert the graph: {error}. "
                "Export for onnxruntime, or with a newer openvino."
            ) from error
    return Engine(
        file="model.xml",
        runtime_version=installed_version("openvino") or "unknown",
        tools={"onnx": installed_version("onnx") or "unknown", "openvino": str(openvino.__version__)},
    )


def _input_shape(openvino: Any, spec: InputSpec) -> Any:
    """The input's shape, with the bounds of a dynamic batch."""
    batch = spec.batch
    first = openvino.Dimension(batch.min, batch.max) if isinstance(batch, BatchRange) else openvino.Dimension(batch)
    return openvino.PartialShape([first, *(openvino.Dimension(side) for side in spec.shape[1:])])


def _name_nodes_in_order(model: Any, source: onnx.ModelProto) -> None:
    """Number the nodes that OpenVINO named from a counter of the process, so that the IR is reproducible."""
    given = {name for node in source.graph.node for name in (node.name, *node.output)}
    given.update(tensor.name for tensor in source.graph.initializer)
    model.set_friendly_name("deploykit")
    for position, node in enumerate(model.get_ordered_ops()):
        name = node.get_friendly_name()
        if name not in given and _COUNTED_NAME.fullmatch(name):
            node.set_friendly_name(f"{node.get_type_name()}/{position}")
