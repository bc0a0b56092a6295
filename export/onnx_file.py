"""Writing an ONNX model where a runtime's reader can find it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from deploykit.errors import ExportError
from deploykit.optional import require

if TYPE_CHECKING:
    import onnx

    from deploykit.export.lowering import Graph

EXTERNAL_DATA_BYTES = 1_500_000_000
"""Above this, weights go to a file beside the model: a protobuf message cannot pass 2 GiB."""


def model_of(graph: Graph, runtime: str) -> onnx.ModelProto:
    """The graph's ONNX form.

    Raises:
        ExportError: it has none, or ONNX's checker refuses it.
    """
    if graph.model is None:
        raise ExportError(
            f"lowering to {runtime} needs an ONNX model and the graph has none. Give a Graph with model= filled."
        )
    if weight_bytes(graph.model) <= EXTERNAL_DATA_BYTES:
        _check(graph.model)
    return graph.model


def write_onnx(model: onnx.ModelProto, path: Path) -> None:
    """Write ``model`` to ``path``, and its weights to ``<path>.data`` when they are large.

    Raises:
        ExportError: ONNX's checker refuses the large model.
    """
    onnx = require("onnx")
    if weight_bytes(model) <= EXTERNAL_DATA_BYTES:
        path.write_bytes(model.SerializeToString(deterministic=True))
        return
    copy = onnx.ModelProto()
    copy.CopyFrom(model)  # save_model moves the weights out of the model it is given
    onnx.save_model(copy, str(path), save_as_external_data=True, location=f"{path.name}.data", size_threshold=1024)
    _check(str(path))


def weight_bytes(model: onnx.ModelProto) -> int:
    """The bytes of all initializers that are stored in the model."""
    return sum(len(tensor.raw_data) for tensor in model.graph.initializer)


def _check(model: onnx.ModelProto | str) -> None:
    """Run ONNX's checker on a model, or on a file's path.

    Raises:
        ExportError: the checker refuses it.
    """
    checker = require("onnx.checker")
    try:
        checker.check_model(model)
    except checker.ValidationError as error:
        raise ExportError(
            f"ONNX's checker refuses the exported graph: {error}. A pass or a dialect wrote an invalid graph; "
            "export without fusion to see which."
        ) from error
