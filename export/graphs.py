"""Parts of a traced backbone: the outputs that an engine gives, out of all that parity compares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import onnx_ir as ir
from torch import Tensor, nn

from deploykit.fusion.program import export_program
from deploykit.graph import Graph, OnnxGraph
from deploykit.spec import BATCH_DIM, TensorSpec


def select(graph: Graph, names: Sequence[str]) -> Graph:
    """Return the part of a graph that gives just these outputs, in this order."""
    chosen = {output.name: output for output in graph.outputs}
    if tuple(names) == tuple(chosen):
        return graph
    outputs = tuple(chosen[name] for name in names)
    if isinstance(graph, OnnxGraph):
        return replace(graph, model=part_giving(graph.model, names), outputs=outputs)
    part = _Part(graph.program.module(), [list(chosen).index(name) for name in names])
    return replace(graph, program=export_program(part, graph.input), outputs=outputs)


def output_specs(model: ir.Model) -> tuple[TensorSpec, ...]:
    """Describe every output of a graph by name and shape; the first dimension is the batch, dynamic ones have names."""
    specs = []
    for value in model.graph.outputs:
        shape = tuple(_size(size, axis) for axis, size in enumerate(value.shape or ()))
        specs.append(TensorSpec(name=str(value.name), shape=shape))
    return tuple(specs)


def _size(size: int | ir.SymbolicDim, axis: int) -> int | str:
    """Return a size, or its name: a batch's where the first is dynamic, else that which `to_onnx` wrote."""
    if isinstance(size, int):
        return size
    return BATCH_DIM if axis == 0 else str(size.value)


def part_giving(model: ir.Model, names: Sequence[str]) -> ir.Model:
    """Return a copy of the part of a model that gives these tensors, outputs or not."""
    whole = model.clone()
    part = ir.convenience.extract(whole.graph, list(whole.graph.inputs), list(names))
    part.opset_imports.update(whole.graph.opset_imports)
    for name in sorted(part.initializers):  # extract() collects them in a set: equal exports give equal bytes
        part.initializers[name] = part.initializers.pop(name)
    return ir.Model(part, ir_version=whole.ir_version, producer_name=whole.producer_name)


class _Part(nn.Module):
    """Some outputs of a module that gives a tuple; tracing it drops what they do not need."""

    def __init__(self, whole: nn.Module, positions: Sequence[int]) -> None:
        super().__init__()
        self.whole = whole
        self.positions = tuple(positions)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Map ``(N, C, H, W)`` to the chosen outputs."""
        outputs = self.whole(images)
        return tuple(outputs[position] for position in self.positions)
