"""One small graph a form of quantization that TensorRT refuses, misreads or takes, with what the parser did with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import tensorrt_rtx as trt
from onnx import TensorProto, helper, numpy_helper

from deploykit.onnx_session import onnx_session

SIDE = 32
OUT = (1, 8, SIDE - 2, SIDE - 2)
SCALE = np.float32(0.02)
WEIGHT = np.random.default_rng(0).normal(size=(8, 3, 3, 3)).astype(np.float32)
WEIGHT_SCALE = np.full(8, 0.03, np.float32)
WEIGHT_INTEGERS = np.clip(np.round(WEIGHT / 0.03), -127, 127).astype(np.int8)


def model_of(nodes: Sequence[onnx.NodeProto], constants: Mapping[str, Any]) -> onnx.ModelProto:
    graph = helper.make_graph(
        list(nodes),
        "form",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 3, SIDE, SIDE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, OUT)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def activation(zero_point: np.generic | None, *, output_dtype: int | None = None, relu: bool = True) -> onnx.ModelProto:
    """(Relu), Q, DQ, Conv: the activation's pair has this zero point, or none."""
    constants: dict[str, Any] = {"scale": SCALE, "weight": WEIGHT}
    pair = ["scale"]
    if zero_point is not None:
        constants["zero"] = zero_point
        pair.append("zero")
    dtype = {} if output_dtype is None else {"output_dtype": output_dtype}
    source = "positive" if relu else "images"
    nodes = [
        *([helper.make_node("Relu", ["images"], ["positive"])] if relu else []),
        helper.make_node("QuantizeLinear", [source, *pair], ["q"], name="quantize_input", **dtype),
        helper.make_node("DequantizeLinear", ["q", *pair], ["dq"], name="dequantize_input"),
        helper.make_node("Conv", ["dq", "weight"], ["logits"]),
    ]
    return model_of(nodes, constants)


def weight(integers: np.ndarray, zero_point: np.ndarray | None, *, bias: bool = False) -> onnx.ModelProto:
    """Relu, Q, DQ, Conv with a quantized weight; ``bias``: int32, behind a DequantizeLinear too."""
    constants: dict[str, Any] = {
        "scale": SCALE,
        "zero": np.int8(0),
        "integers": integers,
        "weight_scale": WEIGHT_SCALE,
        **({} if zero_point is None else {"weight_zero": zero_point}),
    }
    parts = ["integers", "weight_scale", *([] if zero_point is None else ["weight_zero"])]
    nodes = [
        helper.make_node("Relu", ["images"], ["positive"]),
        helper.make_node("QuantizeLinear", ["positive", "scale", "zero"], ["q"], name="quantize_input"),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["dq"], name="dequantize_input"),
        helper.make_node("DequantizeLinear", parts, ["weight"], name="dequantize_weight", axis=0),
    ]
    inputs = ["dq", "weight"]
    if bias:
        constants |= {"b": np.arange(-4, 4, dtype=np.int32) * 100, "b_scale": WEIGHT_SCALE * SCALE}
        constants["b_zero"] = np.zeros(8, np.int32)
        nodes.append(
            helper.make_node("DequantizeLinear", ["b", "b_scale", "b_zero"], ["bias"], name="dequantize_bias", axis=0)
        )
        inputs.append("bias")
    nodes.append(helper.make_node("Conv", inputs, ["logits"]))
    return model_of(nodes, constants)


def integer_operator(operator: str) -> onnx.ModelProto:
    """A graph around one operator that computes on integers itself."""
    constants: dict[str, Any] = {
        "s": SCALE,
        "z": np.int8(0),
        "wi": WEIGHT_INTEGERS,
        "ws": WEIGHT_SCALE,
        "wz": np.zeros(8, np.int8),
    }
    quantize = helper.make_node("QuantizeLinear", ["images", "s", "z"], ["q"], name="quantize_input")
    if operator == "QLinearConv":
        inputs = ["q", "s", "z", "wi", "ws", "wz", "s", "z"]
        nodes = [
            quantize,
            helper.make_node("QLinearConv", inputs, ["c"], name="the_operator"),
            helper.make_node("DequantizeLinear", ["c", "s", "z"], ["logits"]),
        ]
        return model_of(nodes, constants)
    if operator == "ConvInteger":
        nodes = [
            quantize,
            helper.make_node("ConvInteger", ["q", "wi"], ["c"], name="the_operator"),
            helper.make_node("Cast", ["c"], ["logits"], to=TensorProto.FLOAT),
        ]
        return model_of(nodes, {name: constants[name] for name in ("s", "z", "wi")})
    if operator == "MatMulInteger":
        nodes = [
            quantize,
            helper.make_node("MatMulInteger", ["q", "square"], ["c"], name="the_operator"),
            helper.make_node("Cast", ["c"], ["d"], to=TensorProto.FLOAT),
            helper.make_node("Conv", ["d", "weight"], ["logits"]),
        ]
        square = np.eye(SIDE, dtype=np.int8)
        return model_of(nodes, {"s": SCALE, "z": np.int8(0), "square": square, "weight": WEIGHT})
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["images"], ["q", "s", "z"], name="the_operator"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["dq"]),
        helper.make_node("Conv", ["dq", "weight"], ["logits"]),
    ]
    return model_of(nodes, {"weight": WEIGHT})


class Parsed:
    """What the real TensorRT-RTX parser makes of a graph, without any of deploykit's checks."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.warnings: list[str] = []
        said = self.warnings

        class Logger(trt.ILogger):
            def __init__(self) -> None:
                super().__init__()

            def log(self, severity: Any, message: str) -> None:
                if severity == trt.ILogger.WARNING:
                    said.append(message)

        self._logger = Logger()
        self._builder = trt.Builder(self._logger)
        flag = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        self.network = self._builder.create_network(flag)
        self._parser = trt.OnnxParser(self.network, self._logger)
        self.accepted = self._parser.parse(model.SerializeToString())
        self.refused_nodes = [self._parser.get_error(index).node_name() for index in range(self._parser.num_errors)]
        self.complaints = [self._parser.get_error(index).desc() for index in range(self._parser.num_errors)]


def outputs_of(model: onnx.ModelProto, images: np.ndarray) -> np.ndarray:
    """The graph's output in ONNX Runtime, node by node."""
    found: np.ndarray = onnx_session(ir.from_proto(model), optimize=False).run(None, {"images": images})[0]
    return found
