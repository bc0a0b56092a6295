"""Parts of a traced backbone: the outputs that an engine gives, out of all that parity compares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import onnx
import onnx_ir as ir
from torch import Tensor, nn

from deploykit.fusion.program import export_program
from deploykit.graph import Graph
from deploykit.spec import BATCH_DIM, TensorSpec


def select(graph: Graph, names: Sequence[str]) -> Graph:
    """The part of a graph that gives just these outputs, in this order; a form that is absent stays absent."""
    chosen = {output.name: output for output in graph.outputs}
    if tuple(names) == tuple(chosen):
        return graph
    positions = [list(chosen).index(name) for name in names]
    return replace(
        graph,
        program=None
        if graph.program is None
        else export_program(_Part(graph.program.module(), positions), graph.input),
        model=None if graph.model is None else _select_model(graph.model, names),
        outputs=tuple(chosen[name] for name in names),
    )


def output_specs(model: onnx.ModelProto) -> tuple[TensorSpec, ...]:
    """Name and shape of every output of a graph; the first dimension is the batch."""
    specs = []
    for value in model.graph.output:
        dims = value.type.tensor_type.shape.dim
        shape = tuple(dim.dim_value if dim.HasField("dim_value") else BATCH_DIM for dim in dims)
        specs.append(TensorSpec(name=value.name, shape=shape))
    return tuple(specs)


def _select_model(model: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    whole = ir.from_proto(model)
    part = ir.convenience.extract(whole.graph, list(whole.graph.inputs), list(names))
    proto = ir.to_proto(ir.Model(part, ir_version=whole.ir_version, producer_name=whole.producer_name))
    proto.opset_import.MergeFrom([entry for entry in model.opset_import if not proto.opset_import])
    for unordered in (proto.graph.initializer, proto.graph.value_info):
        unordered.sort(key=lambda entry: entry.name)  # extract() collects them in a set
    return proto


class _Part(nn.Module):
    """Some outputs of a module that gives a tuple; tracing it drops what they do not need."""

    def __init__(self, whole: nn.Module, positions: Sequence[int]) -> None:
        super().__init__()
        self.whole = whole
        self.positions = tuple(positions)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """``(N, C, H, W)`` to the chosen outputs."""
        outputs = self.whole(images)
        return tuple(outputs[position] for position in self.positions)
