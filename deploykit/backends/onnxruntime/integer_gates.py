"""Gated maps between integer kernels: a gate lies between 0 and 1 by itself and needs no measured range.

``HardSwish(x) -> x * h`` with ``h = clip(x + 3, 0, 6) / 6``: in uint8 with zero point 0 the rounding of
``x + 3`` at scale 6/255 is the clip, and reading it back at scale 1/255 is the division. A HardSigmoid
that gates a map is the same ``h``.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir

from deploykit.calibration.placement import is_gate
from deploykit.calibration.plan import QuantizationPlan
from deploykit.calibration.ranges import ActivationRange
from deploykit.onnx_values import add_constant, array_of

_GATE_SCALE = 1 / 255
_SATURATED = 6.0
"""Where a sigmoid is within a step of 1/255 of 0 or 1."""


def fold_hard_sigmoids(model: ir.Model, plan: QuantizationPlan) -> QuantizationPlan:
    """Let the convolution before a gate round to the gate itself, where nothing else reads what it writes.

    Its output then has its Q/DQ pair, and the plan shifts its bias by what the gate adds. Comes before
    `quantize_weights`.
    """
    graph, placement = model.graph, plan.placement
    shifts = dict(plan.bias_shift)
    folded: set[str] = set()
    for node in list(graph):
        source = node.inputs[0] if node.op_type == "HardSigmoid" else None
        producer = source.producer() if source is not None else None
        if source is None or producer is None or producer.op_type != "Conv" or producer.name not in placement.weights:
            continue
        readers = list(node.outputs[0].consumers())
        alone = len(list(source.uses())) == 1 and not source.is_graph_output() and not node.outputs[0].is_graph_output()
        if not alone or any(reader.outputs[0].name not in placement.between for reader in readers):
            continue
        offset, top = _line(node)
        gate = _pair(graph, source, f"{node.name}/gate", top / 255, _GATE_SCALE)
        ir.convenience.replace_all_uses_with(node.outputs[0], gate)
        name = str(producer.name)
        channels = len(array_of(graph.initializers[placement.weights[name].weight]))
        shifts[name] = np.full(channels, offset, np.float32) + shifts.get(name, np.float32(0))
        folded.add(placement.weights[name].output)
    writes = tuple(name for name in placement.writes if name not in folded)
    return replace(plan, bias_shift=shifts, placement=replace(placement, writes=writes)) if folded else plan


def clip_gate_ranges(model: ir.Model, plan: QuantizationPlan) -> QuantizationPlan:
    """Keep the part of a range that sigmoids tell apart, where nothing else reads the value.

    The gate then has finer steps.
    """
    placement = plan.placement
    rounded = {*placement.reads, *placement.writes, *placement.between}
    clipped: dict[str, ActivationRange] = {}
    for value in (value for node in model.graph for value in node.outputs):
        name, readers = str(value.name), list(value.consumers())
        if name in rounded and not value.is_graph_output() and all(node.op_type == "Sigmoid" for node in readers):
            measured = plan.range_of(name)
            low, high = (float(np.clip(bound, -_SATURATED, _SATURATED)) for bound in (measured.low, measured.high))
            clipped[name] = replace(measured, low=low, high=high)
    if not clipped:
        return plan
    same_range = {name: source for name, source in placement.same_range.items() if name not in clipped}
    return replace(plan, ranges=plan.ranges | clipped, placement=replace(placement, same_range=same_range))


def split_gates(model: ir.Model, plan: QuantizationPlan) -> QuantizationPlan:
    """Write what stands between integer kernels in operators that have integer kernels, all but its own Q/DQ pair.

    Comes before `quantize_activations`; each value keeps its name.
    """
    values = {value.name: value for node in model.graph for value in node.outputs}
    for name in plan.placement.between:
        if name in values:
            _split(model.graph, values[name])
    return plan


def _split(graph: ir.Graph, value: ir.Value) -> None:
    """Rewrite what gives a HardSwish, a product with a sigmoid, a global average pool or an Add of these."""
    node = value.producer()
    assert node is not None  # noqa: S101  (a gated value is no input of the graph; narrows the type)
    if node.op_type == "HardSwish":
        _split_hard_swish(graph, node)
    elif node.op_type == "ReduceMean":
        _replace(graph, node, ir.node("GlobalAveragePool", [node.inputs[0]], name=f"{node.name}/pool"))
    elif node.op_type not in ("GlobalAveragePool", "Add"):
        for position, factor in enumerate(node.inputs):
            if factor is not None and is_gate(factor):
                node.replace_input_with(position, _gate(graph, factor, f"{node.name}/gate"))


def _gate(graph: ir.Graph, factor: ir.Value, name: str) -> ir.Value:
    """Return a sigmoid's output in integers; a HardSigmoid of integers is written by rounding alone."""
    producer = factor.producer()
    assert producer is not None  # noqa: S101  (is_gate has seen it; narrows the type)
    if producer.op_type != "HardSigmoid" or len(list(factor.uses())) != 1 or factor.is_graph_output():
        return _pair(graph, factor, name, _GATE_SCALE)
    offset, top = _line(producer)
    return _clipped(graph, producer.inputs[0], name, offset=offset, top=top)


def _line(hard_sigmoid: ir.Node) -> tuple[float, float]:
    """Return what a HardSigmoid adds before it clips, and where it clips: ``clip(x + offset, 0, top) / top``."""
    slope = hard_sigmoid.attributes.get_float("alpha", 0.2)
    return hard_sigmoid.attributes.get_float("beta", 0.5) / slope, 1 / slope


def _split_hard_swish(graph: ir.Graph, node: ir.Node) -> None:
    source, name = node.inputs[0], str(node.name)
    gate = _clipped(graph, source, f"{name}/gate", offset=3.0, top=6.0)
    _replace(graph, node, ir.node("Mul", [source, gate], name=f"{name}/product"))


def _clipped(graph: ir.Graph, source: ir.Value | None, name: str, *, offset: float, top: float) -> ir.Value:
    """Return ``clip(source + offset, 0, top) / top`` by rounding alone."""
    constant = _constant(graph, f"{name}/offset", np.array(255, np.uint8), offset / 255)
    shifted = ir.node("Add", [source, constant], name=f"{name}/shifted")
    graph.append(shifted)
    return _pair(graph, shifted.outputs[0], name, top / 255, _GATE_SCALE)


def _replace(graph: ir.Graph, node: ir.Node, other: ir.Node) -> None:
    ir.convenience.replace_nodes_and_values(graph, node, [node], [other], node.outputs, other.outputs)


def _pair(graph: ir.Graph, value: ir.Value, name: str, scale: float, read_as: float | None = None) -> ir.Value:
    """Return a Q/DQ pair of unsigned integers behind a value; ``read_as`` is the scale to restore with."""
    zero = add_constant(graph, f"{name}/zero_point", np.array(0, np.uint8))
    written = add_constant(graph, f"{name}/scale", np.array(scale, np.float32))
    read = written if read_as is None else add_constant(graph, f"{name}/read_as", np.array(read_as, np.float32))
    quantize = ir.node("QuantizeLinear", [value, written, zero], name=f"{name}/quantize")
    quantize.outputs[0].name = f"{name}/integers"
    restored = ir.node("DequantizeLinear", [quantize.outputs[0], read, zero], name=f"{name}/dequantize")
    restored.outputs[0].name = f"{name}/restored"
    graph.extend([quantize, restored])
    return restored.outputs[0]


def _constant(graph: ir.Graph, name: str, integers: np.ndarray, scale: float) -> ir.Value:
    parts = [
        add_constant(graph, f"{name}/integers", integers),
        add_constant(graph, f"{name}/scale", np.array(scale, np.float32)),
        add_constant(graph, f"{name}/zero_point", np.array(0, np.uint8)),
    ]
    node = ir.node("DequantizeLinear", parts, name=f"{name}/dequantize")
    node.outputs[0].name = f"{name}/restored"
    graph.append(node)
    return node.outputs[0]
