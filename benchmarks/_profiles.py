"""What each kernel of an engine does and takes, from the runtime's own profile."""

from __future__ import annotations

import json
import re
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from _layers import (
    ATTENTION,
    INTEGER_BYTES,
    PRODUCT,
    ROUNDING,
    Layer,
    TensorType,
    attention_macs,
    convolution_kind,
    convolution_macs,
    inferred_types,
    layers_of,
    other_kind,
    product_macs,
)

from deploykit.arrays import FloatArray
from deploykit.backends.onnxruntime.adapter import SESSION_SETTINGS

WARM_UP = 3
_MICROSECONDS = 1000.0
_OPENVINO_ITEM = {"u8": 1, "i8": 1, "f16": 2, "bf16": 2, "f32": 4, "i32": 4, "i64": 8, "boolean": 1}


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """A layer as the runtime runs it, fused as it fuses, and the median of its times."""

    layer: Layer
    milliseconds: float


def profiled(runtime: str, engine: Path, image: FloatArray, runs: int) -> list[Kernel]:
    """Run an engine under its runtime's profiler.

    Args:
        runtime: ``onnxruntime`` or ``openvino``.
        engine: the file that it opens.
        image: ``(1, 3, H, W)``.
        runs: how many are measured, after `WARM_UP`.
    """
    return _PROFILERS[runtime](engine, image, runs)


def _in_onnxruntime(engine: Path, image: FloatArray, runs: int) -> list[Kernel]:
    import onnxruntime

    with tempfile.TemporaryDirectory() as scratch:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(scratch) / "profile")
        options.optimized_model_filepath = str(Path(scratch) / "optimized.onnx")
        for key, value in SESSION_SETTINGS.items():
            options.add_session_config_entry(key, value)
        session = onnxruntime.InferenceSession(engine, options, providers=["CPUExecutionProvider"])
        source = session.get_inputs()[0].name
        for _ in range(runs + WARM_UP):
            session.run(None, {source: image})
        events = json.loads(Path(session.end_profiling()).read_text())
        graph = onnx.load(options.optimized_model_filepath)
    own = inferred_types(onnx.load(engine))
    return _kernels_of_events(graph, [event for event in events if event.get("cat") == "Node"], image, own)


def _kernels_of_events(
    graph: onnx.ModelProto, events: Sequence[dict[str, Any]], image: FloatArray, own: Mapping[str, TensorType]
) -> list[Kernel]:
    """Join the optimized graph, which has the weights, with the profile, which has shapes and times.

    Blocked convolutions pad their channels to the width of the processor's vectors; they count with the shapes of the
    engine's own activations, ``own``, and weights to match.
    """
    times: dict[str, list[float]] = {}
    outputs: dict[str, list[TensorType]] = {}
    for event in events:
        name = str(event["name"]).removesuffix("_kernel_time")
        times.setdefault(name, []).append(event["dur"] / _MICROSECONDS)
        outputs[name] = [_of_event(each) for each in event["args"]["output_type_shape"]]
    types = {graph.graph.input[0].name: TensorType(shape=image.shape)}
    for node in graph.graph.node:
        types.update(zip([name for name in node.output if name], outputs.get(node.name, []), strict=False))
        unpadded = own.get(_BLOCKED.sub("", node.name)) if node.domain == _BLOCKED_DOMAIN else None
        if unpadded is not None:
            types[node.output[0]] = unpadded
    _unpad_weights(graph, types)
    return [
        Kernel(layer=layer, milliseconds=statistics.median(times[layer.name][WARM_UP:]))
        for layer in layers_of(graph, types)
        if layer.name in times
    ]


def _unpad_weights(graph: onnx.ModelProto, types: Mapping[str, TensorType]) -> None:
    """Give the weights of blocked convolutions of one group the channels that they read and write, in place."""
    weights = {each.name: each for each in graph.graph.initializer}
    for node in graph.graph.node:
        groups = next((each.i for each in node.attribute if each.name == "group"), 1)
        if node.domain == _BLOCKED_DOMAIN and node.op_type == "Conv" and groups == 1:
            read, written = types.get(node.input[0]), types.get(node.output[0])
            if read is not None and written is not None:
                weights[node.input[1]].dims[:2] = written.shape[1], read.shape[1]


def _of_event(entry: dict[str, list[int]]) -> TensorType:
    (kind, shape), *_ = entry.items()
    return TensorType(shape=tuple(shape), itemsize=1 if kind == "bool" else np.dtype(_NUMPY.get(kind, kind)).itemsize)


_BLOCKED_DOMAIN = "com.microsoft.nchwc"
_BLOCKED = re.compile(r"_nchwc(_token_\d+)?$")
"""ONNX Runtime names a blocked node by the value that it writes."""
_NUMPY = {"float": "float32", "double": "float64"}


def _in_openvino(engine: Path, image: FloatArray, runs: int) -> list[Kernel]:
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY", "PERF_COUNT": True}
    compiled = openvino.Core().compile_model(str(engine), "CPU", settings)
    request = compiled.create_infer_request()
    times: dict[str, list[float]] = {}
    for number in range(runs + WARM_UP):
        request.infer([image], share_inputs=True)
        for entry in request.get_profiling_info() if number >= WARM_UP else ():
            if str(entry.status).endswith("EXECUTED"):
                times.setdefault(entry.node_name, []).append(entry.real_time.total_seconds() * 1000)
    operators = compiled.get_runtime_model().get_ordered_ops()
    layers = [_of_openvino(operator) for operator in operators if operator.get_friendly_name() in times]
    return [Kernel(layer=layer, milliseconds=statistics.median(times[layer.name])) for layer in layers]


def _of_openvino(operator: Any) -> Layer:
    """Describe a node of the graph that OpenVINO executes."""
    kind_name = _told(operator, "layerType")
    sources = [each.get_source_output().get_node() for each in operator.inputs()]
    constant = [_told(source, "layerType") == "Const" or _is_reshaped_constant(source) for source in sources]
    inputs = [_type(source) for source in sources]
    output = _type(operator)
    kind, macs = _work_in_openvino(kind_name, inputs, constant, output)
    precision = _told(operator, "runtimePrecision")
    return Layer(
        name=operator.get_friendly_name(),
        operator=kind_name,
        kind=kind,
        macs=macs,
        weight_bytes=sum(each.bytes for each, fixed in zip(inputs, constant, strict=True) if fixed),
        activation_bytes=output.bytes
        + sum(each.bytes for each, fixed in zip(inputs, constant, strict=True) if not fixed),
        integer=kind != ROUNDING and _OPENVINO_ITEM.get(precision, 4) == INTEGER_BYTES,
    )


def _work_in_openvino(
    name: str, inputs: Sequence[TensorType], constant: Sequence[bool], output: TensorType
) -> tuple[str, int]:
    """Return the type and the multiply-adds of a node; grouped weights are ``(groups, O/groups, I/groups, ...)``."""
    if name in ("Convolution", "GroupConvolution"):
        shape = inputs[1].shape
        grouped = len(shape) == len(output.shape) + 1
        weights = (shape[0] * shape[1], *shape[2:]) if grouped else shape
        return convolution_kind(weights, shape[0] if grouped else 1), convolution_macs(weights, output)
    if name in ("FullyConnected", "MatMul", "Gemm"):
        return PRODUCT if constant[1] else ATTENTION, product_macs(inputs[0], output)
    if name == "ScaledDotProductAttention":
        return ATTENTION, attention_macs(inputs[0], inputs[1])
    return other_kind(name), 0


def _is_reshaped_constant(operator: Any) -> bool:
    inputs = operator.inputs()
    return bool(inputs) and all(_told(each.get_source_output().get_node(), "layerType") == "Const" for each in inputs)


def _type(operator: Any) -> TensorType:
    shape = tuple(int(side) for side in operator.outputs()[0].get_shape()) if operator.outputs() else ()
    precision = _told(operator, "outputPrecisions").partition(",")[0]
    return TensorType(shape=shape, itemsize=_OPENVINO_ITEM.get(precision, 4))


def _told(operator: Any, key: str) -> str:
    info = operator.get_rt_info()
    return str(info[key].astype(str)) if key in info else ""


_PROFILERS = {"onnxruntime": _in_onnxruntime, "openvino": _in_openvino}
