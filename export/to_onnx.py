"""A traced program to the master ONNX graph: FP32, named outputs, nothing that names this machine."""

from __future__ import annotations

import re
from collections.abc import Sequence

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as passes
import torch

from deploykit.backbones.attention import onnx_translations
from deploykit.errors import ExportError, plain_reason
from deploykit.export.output_names import name_outputs
from deploykit.export.undecomposed import undecomposed
from deploykit.fusion.constants import hint, shape_of
from deploykit.fusion.locate import describe_node
from deploykit.fusion.quiet import quiet_torch
from deploykit.graph import TRANSPOSED
from deploykit.onnx_values import shape_of_value
from deploykit.optional import require
from deploykit.spec import BATCH_DIM, HEIGHT_DIM, WIDTH_DIM, InputSpec

OPSET = 21
"""The opset of every master graph: the first whose Q/DQ nodes have all integer types."""

_FAILED_NODE = re.compile(r"translating node %(\w+)")


def to_onnx(program: torch.export.ExportedProgram, spec: InputSpec, outputs: Sequence[str]) -> ir.Model:
    """Convert a program to ONNX through torch's dynamo exporter and onnxscript's optimizer.

    Args:
        program: one input ``(N, C, H, W)``, a tuple of outputs.
        spec: the input; its name and batch are those of the graph.
        outputs: a name for each output.

    Raises:
        ExportError: an operator has no ONNX form.
    """
    try:
        with quiet_torch():
            exported = torch.onnx.export(
                undecomposed(program),
                dynamo=True,
                input_names=[spec.name],
                # Names that no tensor of the network has; the optimizer goes by names.
                output_names=[f"deploykit_output_{position}" for position in range(len(outputs))],
                opset_version=OPSET,
                optimize=True,
                custom_translation_table=onnx_translations(),
            )
    except Exception as error:  # the exporter raises its own internal types
        raise ExportError(
            f"the backbone has no ONNX form: {_why(error, program)}. Fix: write that part of the network with "
            "operators that have one."
        ) from error
    if exported is None:
        raise ExportError("torch's ONNX exporter gave no program. Report it with the backbone's name.")
    _name_weights(exported.model, program)
    name_outputs(exported.model, outputs)
    return _tidy(exported.model, program, spec)


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


def _tidy(model: ir.Model, program: torch.export.ExportedProgram, spec: InputSpec) -> ir.Model:
    """Name the dynamic sides, drop stack traces and folder names, and sort: equal exports give equal bytes."""
    passes.ClearMetadataAndDocStringPass()(model)
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.metadata_props.clear()
    if not isinstance(spec.batch, int):
        _rename_batch(model)
    if spec.sizes is not None:
        _rename_sides(model, program, spec)
    model.producer_name, model.producer_version = "deploykit", ""
    model.graph.name = "backbone"
    proto = ir.to_proto(model)
    try:
        onnx.checker.check_model(proto)
    except onnx.checker.ValidationError as error:
        raise ExportError(
            f"torch's ONNX exporter wrote an invalid graph: {plain_reason(error)}. Report it with the network."
        ) from error
    return ir.from_proto(proto)  # the exporter's lazy tensors, turned into arrays once


def _rename_batch(model: ir.Model) -> None:
    for value in (*model.graph.inputs, *model.graph.outputs):
        shape = value.shape
        if shape is not None and not isinstance(shape[0], int):
            value.shape = ir.Shape([BATCH_DIM, *shape[1:]])


def _rename_sides(model: ir.Model, program: torch.export.ExportedProgram, spec: InputSpec) -> None:
    """Name the sides of the images ``height`` and ``width``, and those of a map of stride 8 ``height/8``."""
    (images,) = model.graph.inputs
    batch = shape_of_value(images)[0]
    images.shape = ir.Shape([batch, spec.channels, HEIGHT_DIM, WIDTH_DIM])
    (returned,) = (node for node in program.graph.nodes if node.op == "output")
    for value, node in zip(model.graph.outputs, returned.args[0], strict=True):
        traced = shape_of(node)
        if len(traced) == 4 and not all(isinstance(side, int) for side in traced[2:]):
            strides = [whole // hint(side) for whole, side in zip((spec.height, spec.width), traced[2:], strict=True)]
            sides = [f"{name}/{stride}" for name, stride in zip((HEIGHT_DIM, WIDTH_DIM), strides, strict=True)]
            value.shape = ir.Shape([*shape_of_value(value)[:2], *sides])


def _why(error: BaseException, program: torch.export.ExportedProgram) -> str:
    """Return the operator that the exporter could not write, where it stands, and its reason."""
    chain = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    reason = plain_reason(chain[-1])
    nodes = {node.name: node for node in program.graph.nodes}
    for each in reversed(chain):
        named = _FAILED_NODE.search(str(each))
        if named and named[1] in nodes:
            return f"{describe_node(nodes[named[1]])} ({reason})"
    return reason
