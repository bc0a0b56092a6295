"""Find the operator that a conversion gets wrong: torch program -> ONNX graph, or ONNX graph -> runtime."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from deploykit.arrays import FloatArray
from deploykit.calibration.placement import constant_values
from deploykit.export.graphs import part_giving
from deploykit.export.program_values import ProgramValues
from deploykit.fusion.locate import describe_node
from deploykit.graph import Master
from deploykit.onnx_session import Arrays, graph_batch, values_of
from deploykit.parity.metrics import sqnr_db

FindProblem: TypeAlias = Callable[[ir.Model, Arrays, float], str | None]
"""`Backend.debug`: what a runtime does wrong with a part of a graph; None: nothing."""

SEARCH_SECONDS = 120.0
_SMALL = 64
"""Constants of so few numbers, sizes and scales among them, tell two nodes of one kind apart."""


def wrong_in_onnx(master: Master, images: FloatArray, min_sqnr_db: float) -> str | None:
    """Say which operator of a torch program the ONNX graph computes otherwise; None where it computes all alike.

    Both run node by node on ``images`` ``(N, C, H, W)``, and are compared wherever they give a tensor of one name.
    """
    model = master.onnx.model
    batch = _whole_batch(model, images)
    program = ProgramValues(master.torch)
    given = {str(value.name) for node in model.graph for value in node.outputs}
    ours = program.give((name for name in program.nodes if name in given), batch)
    theirs = values_of(model, list(ours), batch)
    for name, expected in ours.items():
        figure = _decibels(expected, theirs[name])
        if not figure >= min_sqnr_db:
            described = describe_node(program.nodes[name])
            return f"torch's ONNX exporter writes {described} wrongly ({figure:.1f} dB against torch)"
    return None


def wrong_in_runtime(
    model: ir.Model, images: FloatArray, find_problem: FindProblem, min_sqnr_db: float
) -> tuple[ir.Node, str] | None:
    """Find the first node of a graph that a runtime computes otherwise than ONNX defines it, and what it does.

    Each kind of node is tried once, alone, on the values that the whole graph gives it. Where each is right by
    itself, the shortest beginning of the graph that is wrong is found by bisection, and its last node returned.

    Returns:
        None where the graph is right on these images, or nothing was found within `SEARCH_SECONDS`.
    """
    until = time.monotonic() + SEARCH_SECONDS
    batch = _whole_batch(model, images)
    constants = constant_values(model.graph)
    nodes = [node for node in model.graph if any(value is not None and value not in constants for value in node.inputs)]
    values = values_of(model, _tensors_of(nodes), batch)
    tried: set[Hashable] = set()
    for node in nodes:
        kind = _kind(node, values)
        if kind in tried or _has_subgraph(node):
            continue
        tried.add(kind)
        part, inputs = _alone(node, model, values)
        problem = find_problem(part, inputs, min_sqnr_db) if inputs else None
        if problem:
            return node, problem
        if time.monotonic() > until:
            return None
    source: Arrays = {str(model.graph.inputs[0].name): batch}
    return _bisected(model, nodes, lambda part: find_problem(part, source, min_sqnr_db))


def _alone(node: ir.Node, model: ir.Model, values: Arrays) -> tuple[ir.Model, Arrays]:
    """Return a graph of one node: what it reads in floating point is its input, sizes and constants are within."""
    operands: dict[str, ir.Value] = {}
    inputs: Arrays = {}
    for value in filter(None, node.inputs):
        name = str(value.name)
        array = value.const_value.numpy() if value.const_value is not None else values[name]
        tensor = ir.tensor(array, name=name)
        operands[name] = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype))
        if value.const_value is None and np.issubdtype(array.dtype, np.floating):
            inputs[name] = array
        else:
            operands[name].const_value = tensor
    outputs = [
        ir.Value(name=value.name, type=value.type, shape=ir.Shape(values[str(value.name)].shape))
        for value in node.outputs
    ]
    read = [value if value is None else operands[str(value.name)] for value in node.inputs]
    copy = ir.Node(node.domain, node.op_type, read, node.attributes.values(), outputs=outputs, name=node.name)
    graph = ir.Graph(
        [operands[name] for name in inputs],
        outputs,
        nodes=[copy],
        initializers=[operand for name, operand in operands.items() if name not in inputs],
        opset_imports=model.graph.opset_imports,
        name="part",
    )
    return ir.Model(graph, ir_version=model.ir_version), inputs


def _bisected(
    model: ir.Model, nodes: Sequence[ir.Node], fault_of: Callable[[ir.Model], str | None]
) -> tuple[ir.Node, str] | None:
    """Return the last node of the shortest beginning that is wrong, as far as being wrong goes on once begun."""
    ends = [node for node in nodes if node.outputs[0].dtype == ir.DataType.FLOAT and not _has_subgraph(node)]
    low, high = 0, len(ends) - 1
    fault = fault_of(part_giving(model, [str(ends[high].outputs[0].name)])) if ends else None
    while fault is not None and low < high:
        middle = (low + high) // 2
        found = fault_of(part_giving(model, [str(ends[middle].outputs[0].name)]))
        if found is None:
            low = middle + 1
        else:
            fault, high = found, middle
    return None if fault is None else (ends[high], fault)


def _tensors_of(nodes: Iterable[ir.Node]) -> list[str]:
    """Return the names of the computed tensors that some nodes read and give."""
    tensors = {value for node in nodes for value in (*node.inputs, *node.outputs) if value is not None}
    return sorted(str(value.name) for value in tensors if value.const_value is None)


def _kind(node: ir.Node, values: Arrays) -> Hashable:
    """Return what makes two nodes alike for a runtime: operator, settings, shapes and small constants."""
    attributes = tuple(sorted((name, str(attribute.value)) for name, attribute in node.attributes.items()))
    read: list[Hashable] = []
    for value in node.inputs:
        if value is None:
            read.append(None)
            continue
        constant = value.const_value is not None
        array = value.const_value.numpy() if value.const_value is not None else values[str(value.name)]
        small = array.tobytes() if constant and array.size <= _SMALL else b""
        read.append((array.shape, str(array.dtype), constant, small))
    return node.domain, node.op_type, attributes, tuple(read), len(node.outputs)


def _has_subgraph(node: ir.Node) -> bool:
    return any(attribute.type == ir.AttributeType.GRAPH for attribute in node.attributes.values())


def _whole_batch(model: ir.Model, images: FloatArray) -> FloatArray:
    """Return as many images as one call takes, repeated where there are fewer."""
    return np.ascontiguousarray(images[np.arange(graph_batch(model)) % len(images)])


def _decibels(expected: npt.NDArray[Any], found: npt.NDArray[Any]) -> float:
    """Return the SQNR; nothing can be said of no numbers and of infinite ones."""
    if expected.shape != found.shape:
        return float("-inf")
    return sqnr_db(expected, found) if expected.size and np.isfinite(expected).all() else float("inf")
