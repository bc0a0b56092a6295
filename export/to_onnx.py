"""A traced program to the master ONNX graph: FP32, named outputs, nothing that names this machine."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as passes
import torch

from deploykit.backbones.attention import TRANSPOSED, onnx_translations
from deploykit.errors import ExportError
from deploykit.optional import require
from deploykit.spec import BATCH_DIM, InputSpec

OPSET = 21
"""The opset of every master graph: the first whose Q/DQ nodes have all integer types."""


def to_onnx(program: torch.export.ExportedProgram, spec: InputSpec, outputs: Sequence[str]) -> onnx.ModelProto:
    """Convert a program to ONNX through torch's dynamo exporter and onnxscript's optimizer.

    Args:
        program: one input ``(N, C, H, W)``, a tuple of outputs.
        spec: the input; its name and batch are those of the graph.
        outputs: a name for each output.

    Raises:
        ExportError: an operator has no ONNX form.
    """
    try:
        with _quiet():
            exported = torch.onnx.export(
                program,
                dynamo=True,
                input_names=[spec.name],
                output_names=list(outputs),
                opset_version=OPSET,
                optimize=True,
                custom_translation_table=onnx_translations(),
            )
    except Exception as error:  # the exporter raises its own internal types
        raise ExportError(
            f"the backbone has no ONNX form: {str(error).strip().splitlines()[0]}. "
            "Replace the operator that the message names, or report it."
        ) from error
    if exported is None:
        raise ExportError("torch's ONNX exporter gave no program. Report it with the backbone's name.")
    _name_weights(exported.model, program)
    return _tidy(exported.model, spec)


def _name_weights(model: ir.Model, program: torch.export.ExportedProgram) -> None:
    """Fold every transpose of a weight, and name the result after the parameter that it came from."""
    require("onnxscript.optimizer").fold_constants(
        model, should_fold=lambda node: True if node.op_type == "Transpose" else None, output_size_limit=2**31
    )
    passes.RemoveUnusedNodesPass()(model)
    signature = program.graph_signature
    for placeholder, parameter in (signature.inputs_to_parameters | signature.inputs_to_buffers).items():
        value = model.graph.initializers.get(f"{placeholder}{TRANSPOSED}")
        if value is not None:
            value.name = f"{parameter}{TRANSPOSED}"


def _tidy(model: ir.Model, spec: InputSpec) -> onnx.ModelProto:
    """Name the batch, drop stack traces and folder names, and sort: equal exports give equal bytes."""
    passes.ClearMetadataAndDocStringPass()(model)
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.metadata_props.clear()
    if not isinstance(spec.batch, int):
        _rename_batch(model)
    model.producer_name, model.producer_version = "deploykit", ""
    model.graph.name = "backbone"
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto)
    return proto


def _rename_batch(model: ir.Model) -> None:
    for value in (*model.graph.inputs, *model.graph.outputs):
        shape = value.shape
        if shape is not None and not isinstance(shape[0], int):
            value.shape = ir.Shape([BATCH_DIM, *shape[1:]])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's progress lines and its own deprecation warnings off the user's terminal."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
