"""Read an ONNX file that another tool quantized, in the form that the passes work on."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx import version_converter
from onnx_ir.passes import common

from deploykit.errors import QuantizedModelError, plain_reason
from deploykit.export.to_onnx import OPSET
from deploykit.plain_files import digest_of, open_plain
from deploykit.spec import BatchRange, InputSpec, Preprocessing

QUANTIZER_DOMAINS = frozenset({"com.microsoft"})
"""Where quantizers also stand that mean what ONNX's own do: ONNX Runtime writes them for old opsets."""
_PASSES = (
    common.InlinePass(),
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
    common.RemoveInitializersFromInputsPass(),
    common.IdentityEliminationPass(),
    common.NameFixPass(),
)


def read_quantized(path: Path) -> tuple[ir.Model, str]:
    """Read a file, with functions inlined and constants as initializers, and the SHA-256 of it with its weights.

    Raises:
        QuantizedModelError: not there, not ONNX, or of operators that are nobody's standard.
    """
    try:
        with open_plain(path, follow=True) as file:
            weights = hashlib.sha256(digest_of(file).encode())
        model = ir.load(path)
        for value in model.graph.initializers.values():  # reads external weights, which may be missing
            if value.const_value is not None:
                weights.update(np.ascontiguousarray(value.const_value.numpy()).view(np.uint8).data)
    except Exception as error:  # protobuf and the reader raise classes of their own
        raise QuantizedModelError(
            f"{path} cannot be read as ONNX ({plain_reason(error)}). Give the .onnx file that a quantizer wrote, its "
            "external weights beside it."
        ) from error
    for step in _PASSES:
        step(model)
    for node in model.graph:
        if node.domain in QUANTIZER_DOMAINS and node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            node.domain = ""
    own = ("", "ai.onnx")
    foreign = sorted(
        {
            f"{node.domain}.{node.op_type}"
            for node in model.graph
            # Integer operators have a message of their own.
            if node.domain not in own and not (node.domain in QUANTIZER_DOMAINS and node.op_type.startswith("Q"))
        }
    )
    if foreign:
        raise QuantizedModelError(
            f"{path} has operators that ONNX does not define: {', '.join(foreign[:8])}. Fix: quantize in the Q/DQ "
            "format, with the optimizations of the runtime off."
        )
    return model, weights.hexdigest()


def settle_opset(model: ir.Model) -> ir.Model:
    """Return a float graph in the opset of every master graph, with the shapes of all its values.

    Raises:
        QuantizedModelError: an operator has no form there.
    """
    proto = ir.to_proto(model)
    del proto.opset_import[:]
    proto.opset_import.extend([onnx.helper.make_opsetid("", model.opset_imports.get("", OPSET))])
    del proto.graph.value_info[:]
    try:
        if proto.opset_import[0].version < OPSET:
            proto = version_converter.convert_version(proto, OPSET)
        inferred = onnx.shape_inference.infer_shapes(proto, data_prop=True)
    except Exception as error:  # the converter raises what it likes
        raise QuantizedModelError(
            f"the graph's opset {model.opset_imports.get('')} has no form in opset {OPSET} ({plain_reason(error)}). "
            f"Fix: export the float model in opset {OPSET} and quantize that."
        ) from error
    settled = ir.from_proto(inferred)
    for step in _PASSES:
        step(settled)
    settled.graph.sort()
    _tell_nodes_from_tensors(settled.graph)
    return settled


def _tell_nodes_from_tensors(graph: ir.Graph) -> None:
    """Rename nodes that are called as a tensor is: what a dialect adds is named after either."""
    tensors = {value.name for node in graph for value in node.outputs} | set(graph.initializers)
    tensors |= {value.name for value in graph.inputs}
    taken = {node.name for node in graph}
    for node in graph:
        while node.name in tensors:
            node.name = f"{node.name}/{node.op_type}"
            if node.name in taken:
                node.name += "/again"
        taken.add(node.name)


def input_of(model: ir.Model, preprocessing: Preprocessing) -> InputSpec:
    """Describe the images that a graph takes.

    Raises:
        QuantizedModelError: something else than one float32 ``(N, C, H, W)``, with C, H and W fixed.
    """
    inputs = list(model.graph.inputs)
    shape = list(inputs[0].shape or ()) if len(inputs) == 1 else []
    sides = [side for side in shape[1:] if isinstance(side, int) and side > 0]
    if len(shape) != 4 or len(sides) != 3 or inputs[0].dtype != ir.DataType.FLOAT:
        seen = ", ".join(f"{value.name} {value.shape} {value.dtype}" for value in inputs)
        raise QuantizedModelError(
            f"the graph takes {seen or 'nothing'}; expected one input (N, C, H, W) in float32 with C, H and W fixed. "
            "Fix: export with a fixed image size."
        )
    channels, height, width = sides
    batch = shape[0] if isinstance(shape[0], int) and shape[0] > 0 else BatchRange(max=64)
    return InputSpec(
        name=str(inputs[0].name),
        batch=batch,
        channels=channels,
        height=height,
        width=width,
        preprocessing=preprocessing,
    )
