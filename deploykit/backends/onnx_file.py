"""Writing an ONNX model where a runtime's reader can find it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from deploykit.errors import ExportError
from deploykit.optional import require

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

EXTERNAL_DATA_BYTES = 1_500_000_000
"""Above this, weights go to a file beside the model: a protobuf message cannot pass 2 GiB."""


def write_onnx(model: ir.Model | onnx.ModelProto, path: Path) -> None:
    """Check a model and write it to ``path``, and its weights to ``<path>.data`` when they are large.

    Raises:
        ExportError: ONNX's checker refuses the model.
    """
    onnx = require("onnx")
    proto = model if isinstance(model, onnx.ModelProto) else require("onnx_ir").to_proto(model)
    if sum(len(tensor.raw_data) for tensor in proto.graph.initializer) <= EXTERNAL_DATA_BYTES:
        _check(proto)
        path.write_bytes(proto.SerializeToString(deterministic=True))
        return
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)  # save_model moves the weights out of the model it is given
    onnx.save_model(copy, str(path), save_as_external_data=True, location=f"{path.name}.data", size_threshold=1024)
    _check(str(path))


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
