"""MatMul(x, w) + b -> Reshape(Gemm(Reshape(x), w, b)), in ONNX graphs.

ONNX Runtime starts a Gemm from its bias, and adds it to a product of more than two axes in a pass of its own; before
a GELU it does both at once by an operator that takes longer than its Gelu alone, whose kernel is vectorized.
"""

from __future__ import annotations

import onnx_ir as ir

from deploykit.fusion.data_movement import constant, is_static, only_reader, sizes
from deploykit.fusion.graph_writer import GraphWriter


def fuse_linear(model: ir.Model) -> int:
    """Write linear layers over ``(N, ..., C)`` as one operator over ``(N * ..., C)``, in place.

    Exact in real arithmetic; the reshapes move nothing. Left alone: half precision and Q/DQ graphs,
    products that something else reads, biases or weights that are not constant, and sizes that are
    not static but for the batch.

    Returns:
        How many layers were written.
    """
    return sum(_fuse(model, node) for node in list(model.graph) if node.op_type == "MatMul")


def _fuse(model: ir.Model, product: ir.Node) -> bool:
    source, weight = product.inputs
    add = only_reader(product.outputs[0])
    matrix = constant(weight)
    if add is None or add.op_type != "Add" or matrix is None or matrix.ndim != 2 or source is None:
        return False
    (bias,) = (value for value in add.inputs if value is not product.outputs[0])
    vector, result = constant(bias), add.outputs[0]
    if vector is None or vector.shape != matrix.shape[1:] or result.dtype != ir.DataType.FLOAT or result.shape is None:
        return False
    if result.is_graph_output():
        return False
    if not is_static(result) or len(sizes(result)) < 2:
        return False
    graph = GraphWriter(model=model, before=add, name=f"{result.name}_linear")
    rows = graph.shaped(source, matrix.shape[:1], "rows")
    layer = graph.node("Gemm", [rows, weight, bias], matrix.shape[1:], "gemm")
    written = graph.shaped(layer, sizes(result), "result")
    ir.convenience.replace_all_uses_with(result, written)
    model.graph.remove([add, product], safe=True)
    return True
