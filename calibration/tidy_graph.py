"""Sort a rewritten graph, drop what nothing reads, and forget shapes and types that the rewriting left stale."""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as passes

from deploykit.calibration.plan import QuantizationPlan


def tidy_graph(model: ir.Model, plan: QuantizationPlan) -> QuantizationPlan:
    """Finish a rendering: the last pass of every INT8 dialect. Stale shapes mislead TensorRT's parser."""
    model.graph.sort()
    passes.RemoveUnusedNodesPass()(model)
    for node in model.graph:
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = value.type = None
    return plan
