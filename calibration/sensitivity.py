"""How much of the outputs' noise each integer node makes: measured one node at a time, in one session.

Beside each integer node stands a switch (``If``) that rounds what it reads, and its weight and bias are
inputs of the graph, so that any set of nodes is quantized by feeding it, without building a graph a node.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from deploykit.arrays import Array, FloatArray
from deploykit.calibration.dialect import Dialect, OnnxDialect
from deploykit.calibration.float_fallback import keep_pointlike
from deploykit.calibration.placement import IntegerWeight
from deploykit.calibration.plan import QuantizationPlan
from deploykit.onnx_session import batches_of, graph_batch, onnx_session
from deploykit.onnx_values import add_constant
from deploykit.optional import require
from deploykit.parity.metrics import sqnr_db
from deploykit.parity.report import MAX_SQNR_DB

if TYPE_CHECKING:
    from pathlib import Path

MEASURED_IMAGES = 4

PLAIN_DIALECT: Dialect = OnnxDialect(float_choices=(keep_pointlike(),))
"""uint8 activations with the plan's ranges, for every operator."""


Part: TypeAlias = Literal["both", "weights", "activations"]
"""What of a node runs in integers: its weight and bias, what it reads, or both."""


@dataclass(frozen=True, kw_only=True)
class NodeSensitivity:
    """One integer node: the SQNR in dB of each output when it alone is quantized, and its work.

    ``weights_db`` and ``activations_db`` are that of the output that suffers most when only the node's weight, or only
    what it reads, is rounded. ``layer`` is its weight's name in the state dict. ``macs`` are the
    multiply-accumulates of one image. A perfect match is `MAX_SQNR_DB`.
    """

    node: str
    layer: str
    operator: str
    macs: int
    sqnr_db: dict[str, float]
    weights_db: float = MAX_SQNR_DB
    activations_db: float = MAX_SQNR_DB

    @property
    def worst_db(self) -> float:
        """The SQNR of the output that suffers most."""
        return min(self.sqnr_db.values())

    @property
    def noise(self) -> float:
        """The noise in that output, as a share of its power."""
        return float(10 ** (-self.worst_db / 10))


@dataclass(frozen=True, kw_only=True)
class Cure:
    """What was tried against the noise: ``worst_db`` of the output that suffers most, and ``gain_db`` over the plan.

    ``how`` is what an export is told to have it.
    """

    name: str
    how: str
    worst_db: float
    gain_db: float


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """Every integer node, the noisiest first, and the SQNR of each output with all of them quantized at once.

    ``weights_db`` and ``activations_db`` are with the weights of all, and with what all read, alone; empty where they
    were not told apart. ``cures`` are what was tried, the best first; empty where nothing was.
    """

    images: int
    nodes: tuple[NodeSensitivity, ...]
    together_db: dict[str, float]
    weights_db: dict[str, float] = field(default_factory=dict)
    activations_db: dict[str, float] = field(default_factory=dict)
    cures: tuple[Cure, ...] = ()

    def shares(self) -> dict[str, float]:
        """Return each node's part, 0 to 1, of the noise that all of them make when each works alone."""
        total = math.fsum(entry.noise for entry in self.nodes) or 1.0
        return {entry.node: entry.noise / total for entry in self.nodes}

    def plot(self, path: Path) -> None:
        """Draw a bar a node, the noisiest at the top, into an image file.

        Raises:
            MissingDependency: matplotlib is not installed.
        """
        pyplot = require("matplotlib.figure")
        figure = pyplot.Figure(figsize=(8, 1 + 0.2 * len(self.nodes)), layout="constrained")
        axes = figure.add_subplot()
        axes.barh([entry.layer for entry in self.nodes], [entry.worst_db for entry in self.nodes])
        axes.invert_yaxis()
        axes.set_xlabel("SQNR of the worst output with this node alone in integers, dB")
        figure.savefig(path)


def measure_sensitivity(
    model: ir.Model, plan: QuantizationPlan, images: FloatArray, dialect: Dialect, *, parts: bool = False
) -> Sensitivity:
    """Quantize the integer nodes of a plan one at a time and compare the outputs with FP32.

    A node's own noise is that of its weight, its corrected bias and what it reads; what residual
    adds and pools lose is in no node's figure.

    Args:
        model: the FP32 master graph.
        plan: which nodes run in integers, with the range of what they read.
        images: ``(N, C, H, W)`` to measure on; `MEASURED_IMAGES` of them are used.
        dialect: how the runtime quantizes what a node reads, and what it keeps in float.
        parts: also tell the noise of weights from that of what is read, in three times the time.
    """
    plan = dialect.keep_float(model, plan)
    simulation = Simulation(model, plan, images, dialect)
    nodes = [
        NodeSensitivity(
            node=name,
            layer=use.weight.removeprefix("backbone.").removesuffix(".weight"),
            operator=simulation.operators[name],
            macs=simulation.macs[name],
            sqnr_db=simulation.sqnr_db({name}),
        )
        for name, use in plan.placement.weights.items()
    ]
    found = Sensitivity(
        images=simulation.images,
        nodes=tuple(sorted(nodes, key=lambda entry: entry.worst_db)),
        together_db=simulation.sqnr_db(plan.placement.weights),
    )
    return _with_parts(found, simulation) if parts else found


def _with_parts(found: Sensitivity, simulation: Simulation) -> Sensitivity:
    """Add the noise of weights alone and of what is read alone, for each node and for all."""

    def worst(node: str, part: Part) -> float:
        return min(simulation.sqnr_db({node}, part).values())

    names = [entry.node for entry in found.nodes]
    return replace(
        found,
        nodes=tuple(
            replace(entry, weights_db=worst(entry.node, "weights"), activations_db=worst(entry.node, "activations"))
            for entry in found.nodes
        ),
        weights_db=simulation.sqnr_db(names, "weights"),
        activations_db=simulation.sqnr_db(names, "activations"),
    )


class Simulation:
    """The master graph with a switch at each integer node.

    Args:
        model: the FP32 master graph.
        plan: which nodes have a switch, with the range of what they read.
        images: ``(N, C, H, W)``; ``most`` of them are used.
        dialect: how the runtime quantizes what a node reads.
        most: how many images.
    """

    def __init__(
        self,
        model: ir.Model,
        plan: QuantizationPlan,
        images: FloatArray,
        dialect: Dialect = PLAIN_DIALECT,
        *,
        most: int = MEASURED_IMAGES,
    ) -> None:
        self._plan = plan
        self._dialect = dialect
        self._exact: dict[str, Array] = {}
        self._rounded: dict[str, dict[str, Array]] = {}
        self.operators: dict[str, str] = {}
        self.macs: dict[str, int] = {}
        opened = model.clone()
        nodes = {node.name: node for node in opened.graph}
        for name, use in plan.placement.weights.items():
            self._open(opened.graph, nodes[name], use)
        self._outputs = [str(value.name) for value in model.graph.outputs]
        self._input = str(model.graph.inputs[0].name)
        self.batches = batches_of(images, graph_batch(model), min(most, len(images)))
        self.images = sum(map(len, self.batches))
        self._session = onnx_session(opened)
        self._reference: list[Array] | None = None

    def sqnr_db(self, quantized: Collection[str], part: Part = "both") -> dict[str, float]:
        """Return the SQNR in dB of every output against FP32 when these nodes run in integers, at most `MAX_SQNR_DB`.

        Args:
            quantized: the nodes.
            part: what of them is rounded.
        """
        if self._reference is None:
            self._reference = self._run(())
        found = self._run(quantized, part)
        return {
            name: float(np.clip(sqnr_db(before, after), -MAX_SQNR_DB, MAX_SQNR_DB))
            for name, before, after in zip(self._outputs, self._reference, found, strict=True)
        }

    def read_by(self, nodes: Sequence[str], batch: FloatArray, quantized: Collection[str] = ()) -> list[FloatArray]:
        """What nodes read when some run in integers, rounded where the reader itself does; nothing behind is run."""
        wanted = [_read_name(node) for node in nodes]
        read = self._session.run_path(wanted, self._feeds(quantized) | {self._input: batch})
        return [np.asarray(values, np.float32) for values in read]

    def round_to(self, node: str, weight: FloatArray, shift: FloatArray) -> None:
        """Give a node another weight and bias for when it runs in integers."""
        values = self._rounded[node]
        values[f"{node}/weight"] = np.require(weight, np.float32, "C")
        if f"{node}/bias" in values:
            values[f"{node}/bias"] = self._exact[f"{node}/bias"].astype(np.float32) + shift

    def _feeds(self, quantized: Collection[str], part: Part = "both") -> dict[str, Array]:
        feed = dict(self._exact)
        for name in quantized:
            switch = _switch_name(name)
            feed |= {
                key: value
                for key, value in self._rounded[name].items()
                if part == "both" or (key == switch) == (part == "activations")
            }
        return feed

    def _run(self, quantized: Collection[str], part: Part = "both") -> list[Array]:
        feed = self._feeds(quantized, part)
        runs = [self._session.run(self._outputs, feed | {self._input: batch}) for batch in self.batches]
        return [np.concatenate(parts) for parts in zip(*runs, strict=True)]

    def _open(self, graph: ir.Graph, node: ir.Node, use: IntegerWeight) -> None:
        name = str(node.name)
        weight = _array(graph, use.weight)
        self.operators[name] = node.op_type
        self.macs[name] = _macs(node, weight)
        integers, scales = self._plan.integers_of(name, weight, use.axis)
        shape = [1] * weight.ndim
        shape[use.axis] = -1
        rounded = (integers * scales.reshape(shape)).astype(np.float32)
        self._rounded[name] = {}
        node.replace_input_with(1, self._feed(graph, name, f"{name}/weight", weight, rounded))
        self._open_bias(graph, node, use, weight.shape[use.axis])
        switch = _switch_name(name)
        flag = self._feed(graph, name, switch, np.array(False), np.array(True))
        read = _switched(graph, node, flag, self._parameters(graph, node, use))
        node.replace_input_with(0, read)
        graph.outputs.append(read)

    def _open_bias(self, graph: ir.Graph, node: ir.Node, use: IntegerWeight, channels: int) -> None:
        if use.bias is None and node.op_type == "MatMul":
            return
        shift = self._plan.bias_shift.get(str(node.name), 0.0)
        bias = np.zeros(channels, np.float32) if use.bias is None else _array(graph, use.bias)
        value = self._feed(graph, str(node.name), f"{node.name}/bias", bias, (bias + shift).astype(np.float32))
        if node.op_type == "MatMul":
            add = next(iter(node.outputs[0].consumers()))
            add.replace_input_with([operand.name for operand in add.inputs if operand].index(use.bias), value)
            return
        node.resize_inputs(max(3, len(node.inputs)))
        node.replace_input_with(2, value)

    def _feed(self, graph: ir.Graph, node: str, name: str, exact: Array, rounded: Array) -> ir.Value:
        """Return an input of the graph with two values: one in float and one for the node in integers."""
        exact = np.require(exact, requirements="C")
        self._exact[name], self._rounded[node][name] = exact, rounded
        dtype = ir.DataType.from_numpy(exact.dtype)
        value = ir.Value(name=name, shape=ir.Shape(exact.shape), type=ir.TensorType(dtype))
        graph.inputs.append(value)
        return value

    def _parameters(self, graph: ir.Graph, node: ir.Node, use: IntegerWeight) -> tuple[ir.Value, ir.Value] | None:
        """Scale and zero point of what a node reads; None where the runtime takes them from each call."""
        if node.op_type in self._dialect.dynamic_operators:
            return None
        scale, zero = self._dialect.activations.parameters(self._plan.range_of(use.input))
        return (
            add_constant(graph, f"{node.name}/input_scale", scale),
            add_constant(graph, f"{node.name}/input_zero", zero),
        )


def _switch_name(node: str) -> str:
    return f"{node}/quantized"


def _read_name(node: str) -> str:
    return f"{node}/read"


def _switched(graph: ir.Graph, node: ir.Node, flag: ir.Value, parameters: tuple[ir.Value, ir.Value] | None) -> ir.Value:
    """Return what a node reads behind ``If(flag)``: rounded, or as it is."""
    source = node.inputs[0]
    assert source is not None  # noqa: S101  (ONNX requires it; narrows the type)
    if parameters is None:
        quantize = ir.node("DynamicQuantizeLinear", [source], num_outputs=3)
        scale, zero = quantize.outputs[1], quantize.outputs[2]
    else:
        scale, zero = parameters
        quantize = ir.node("QuantizeLinear", [source, scale, zero])
    restored = ir.node("DequantizeLinear", [quantize.outputs[0], scale, zero])
    same = ir.node("Identity", [source])
    branches = {}
    for branch, nodes in (("then_branch", [quantize, restored]), ("else_branch", [same])):
        result = nodes[-1].outputs[0]
        for position, value in enumerate(value for inner in nodes for value in inner.outputs):
            value.name = f"{node.name}/{branch}/{position}"
        result.type, result.shape = ir.TensorType(ir.DataType.FLOAT), source.shape
        branches[branch] = ir.AttrGraph(branch, ir.Graph([], [result], nodes=nodes, name=f"{node.name}/{branch}"))
    switch = ir.node("If", [flag], branches, name=f"{node.name}/switch")
    switch.outputs[0].name = _read_name(str(node.name))
    switch.outputs[0].type, switch.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), source.shape
    graph.insert_before(node, [switch])
    return switch.outputs[0]


def _array(graph: ir.Graph, name: str) -> npt.NDArray[np.float32]:
    tensor = graph.initializers[name].const_value
    assert tensor is not None  # noqa: S101  (an initializer has a value; narrows the type)
    return tensor.numpy()


def _macs(node: ir.Node, weight: npt.NDArray[np.float32]) -> int:
    """Multiply-accumulates of one image: every weight works once for each position of the output."""
    dims = [dim if isinstance(dim, int) else 1 for dim in node.outputs[0].shape or ()]
    positions = dims[2:] if node.op_type == "Conv" else dims[1:-1]
    return int(weight.size * math.prod(positions))
