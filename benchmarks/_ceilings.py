"""What a machine can do at most: products, convolutions and memory, through the kernels of the runtimes themselves.

Each ceiling is a chain of equal layers, large enough for the kernels and small enough for the caches, and the fastest
of several calls; a runtime's own overhead is part of it. Integer chains are Q/DQ graphs, as an export writes them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx
from _layers import layers_of
from _timing import RUNTIMES, Call, in_openvino
from onnx import TensorProto, helper, numpy_helper

from deploykit.arrays import FloatArray

CHANNELS, SIDE, DEPTH = 256, 28, 6
"""Convolutions of 3x3: 0.46 GMACs each."""
ROWS, COLUMNS = 512, 1024
"""Products of ``(ROWS, COLUMNS)`` with ``(COLUMNS, COLUMNS)``."""
STREAM_MB = 96
"""A tensor that no cache holds."""
TRIES = 60
"""Enough that a shared machine has a quiet moment among them."""
OPSET = 17


@dataclass(frozen=True, kw_only=True)
class Ceiling:
    """The most of one kind of work: ``unit`` is GMAC/s, GB/s, or microseconds a call."""

    work: str
    precision: str
    runtime: str
    value: float
    unit: str = "GMAC/s"


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """A machine's ceilings: multiply-adds a second by precision, and bytes a second."""

    rows: tuple[Ceiling, ...]

    def macs_per_ms(self, precision: str) -> float:
        """Return the most multiply-adds a millisecond at ``fp32`` or ``int8``, of any kernel in any runtime."""
        return 1e6 * max(row.value for row in self.rows if row.precision == precision and row.unit == "GMAC/s")

    @property
    def bytes_per_ms(self) -> float:
        """Return the most bytes a millisecond from and to memory."""
        return 1e6 * max(row.value for row in self.rows if row.unit == "GB/s")


def measure(tries: int = TRIES) -> Ceilings:
    """Measure every ceiling that this machine has."""
    rows = []
    for runtime, open_graph in RUNTIMES.items():
        for work, build in (("convolution", convolutions), ("product", products)):
            for precision in ("fp32", "int8"):
                model = build(integers=precision == "int8")
                rate = _rate(open_graph(model), model, tries)
                rows.append(Ceiling(work=work, precision=precision, runtime=runtime, value=rate))
        rows.append(_bandwidth(runtime, open_graph(stream(STREAM_MB)), tries))
        rows.append(_overhead(runtime, open_graph(stream(0)), 50 * tries))
    if _has_bf16():
        for work, build in (("convolution", convolutions), ("product", products)):
            model = build(integers=False)
            rate = _rate(in_openvino(model, "bf16"), model, tries)
            rows.append(Ceiling(work=work, precision="bf16", runtime="openvino", value=rate))
    rows.append(_copy(tries))
    return Ceilings(rows=tuple(rows))


def convolutions(*, integers: bool) -> onnx.ModelProto:
    """A chain of 3x3 convolutions, each followed by Relu."""
    generator = np.random.default_rng(0)
    scale = 1 / np.sqrt(CHANNELS * 9)
    weights = [generator.normal(0, scale, (CHANNELS, CHANNELS, 3, 3)).astype(np.float32) for _ in range(DEPTH)]
    return _chain("Conv", weights, (1, CHANNELS, SIDE, SIDE), integers=integers, pads=[1, 1, 1, 1])


def products(*, integers: bool) -> onnx.ModelProto:
    """A chain of matrix products, each followed by Relu."""
    generator = np.random.default_rng(0)
    scale = 1 / np.sqrt(COLUMNS)
    weights = [generator.normal(0, scale, (COLUMNS, COLUMNS)).astype(np.float32) for _ in range(DEPTH)]
    return _chain("MatMul", weights, (1, ROWS, COLUMNS), integers=integers)


def _chain(
    operator: str, weights: list[FloatArray], shape: tuple[int, ...], *, integers: bool, **attributes: object
) -> onnx.ModelProto:
    nodes: list[onnx.NodeProto] = []
    constants: list[onnx.TensorProto] = []
    if integers:
        constants += [_constant("step", np.float32(0.02)), _constant("zero", np.uint8(0))]
    value = _rounded(nodes, "images", integers=integers)
    for number, weight in enumerate(weights):
        name = f"weight{number}"
        if integers:
            step = np.float32(np.abs(weight).max() / 63)  # seven bits: no product saturates on any processor
            constants += [
                _constant(f"{name}/integers", np.round(weight / step).astype(np.int8)),
                _constant(f"{name}/step", step),
                _constant(f"{name}/zero", np.int8(0)),
            ]
            parts = [f"{name}/integers", f"{name}/step", f"{name}/zero"]
            nodes.append(helper.make_node("DequantizeLinear", parts, [name], name=f"{name}/dq"))
        else:
            constants.append(_constant(name, weight))
        layer, relu = f"layer{number}", f"relu{number}"
        nodes.append(helper.make_node(operator, [value, name], [layer], name=layer, **attributes))
        nodes.append(helper.make_node("Relu", [layer], [relu], name=relu))
        value = _rounded(nodes, relu, integers=integers)
    nodes.append(helper.make_node("ReduceMax", [value], ["result"], axes=[-1], keepdims=0, name="result"))
    return _model(nodes, constants, shape)


def _rounded(nodes: list[onnx.NodeProto], value: str, *, integers: bool) -> str:
    if not integers:
        return value
    nodes.append(helper.make_node("QuantizeLinear", [value, "step", "zero"], [f"{value}/q"], name=f"{value}/q"))
    nodes.append(
        helper.make_node("DequantizeLinear", [f"{value}/q", "step", "zero"], [f"{value}/dq"], name=f"{value}/dq")
    )
    return f"{value}/dq"


def stream(megabytes: int) -> onnx.ModelProto:
    """One pass over a tensor, which reads it and writes as much; 0 megabytes: a call with nothing to do."""
    elements = max(1, megabytes * 1_000_000 // 4)
    return _model([helper.make_node("Abs", ["images"], ["result"], name="stream")], [], (elements,))


def _model(nodes: list[onnx.NodeProto], constants: list[onnx.TensorProto], shape: tuple[int, ...]) -> onnx.ModelProto:
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, list(shape))
    rank = max(1, len(shape) - 1)  # a chain ends in the maxima of its last axis
    result = helper.make_tensor_value_info("result", TensorProto.FLOAT, [None] * rank)
    graph = helper.make_graph(nodes, "ceiling", [images], [result], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=9)


def _constant(name: str, value: object) -> onnx.TensorProto:
    return numpy_helper.from_array(np.asarray(value), name)


def _rate(call: Call, model: onnx.ModelProto, tries: int) -> float:
    """Return the GMAC/s of a chain."""
    macs = sum(layer.macs for layer in layers_of(_with_float_weights(model)))
    image = _input(model)
    return macs / _fastest(lambda: call(image), tries) / 1e6


def _with_float_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """Let the weights of Q/DQ products count as weights: they are constants behind a DequantizeLinear."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    integers = {each.name: each for each in copy.graph.initializer}
    for node in list(copy.graph.node):
        if node.op_type == "DequantizeLinear" and node.input[0] in integers:
            constant = copy.graph.initializer.add()
            constant.CopyFrom(integers[node.input[0]])
            constant.name = node.output[0]
            copy.graph.node.remove(node)
    return copy


def _bandwidth(runtime: str, call: Call, tries: int) -> Ceiling:
    image = _input(stream(STREAM_MB))
    milliseconds = _fastest(lambda: call(image), tries)
    return Ceiling(
        work="memory", precision="-", runtime=runtime, value=2 * image.nbytes / milliseconds / 1e6, unit="GB/s"
    )


def _copy(tries: int) -> Ceiling:
    source = np.ones(STREAM_MB * 1_000_000 // 4, np.float32)
    target = np.empty_like(source)
    milliseconds = _fastest(lambda: np.copyto(target, source), tries)
    rate = 2 * source.nbytes / milliseconds / 1e6
    return Ceiling(work="memory", precision="-", runtime="numpy copy, 1 core", value=rate, unit="GB/s")


def _overhead(runtime: str, call: Call, tries: int) -> Ceiling:
    image = _input(stream(0))
    times = sorted(_times(lambda: call(image), tries))
    value = 1000 * statistics.median(times)
    return Ceiling(work="empty call", precision="-", runtime=runtime, value=value, unit="us")


def _input(model: onnx.ModelProto) -> FloatArray:
    shape = [side.dim_value for side in model.graph.input[0].type.tensor_type.shape.dim]
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def _fastest(call: Callable[[], object], tries: int) -> float:
    """Milliseconds of the fastest of some calls, after two that are not timed."""
    return min(_times(call, tries))


def _times(call: Callable[[], object], tries: int) -> list[float]:
    found = []
    for _ in range(tries + 2):
        start = time.perf_counter()
        call()
        found.append(1000 * (time.perf_counter() - start))
    return found[2:]


def _has_bf16() -> bool:
    import openvino

    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
