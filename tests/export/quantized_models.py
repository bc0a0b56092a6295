"""A small network of mobile blocks, and what quantizers make of it; made in memory, in a second."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SIDE, CLASSES = 32, 7


def network(activation: str = "Clip", opset: int = 21) -> onnx.ModelProto:
    """A stem, an inverted residual with its depthwise convolution, a head and a classifier."""
    generator = np.random.default_rng(0)
    nodes, constants = [], [numpy_helper.from_array(np.array(v, np.float32), n) for n, v in (("zero", 0), ("six", 6))]

    def conv(name, source, outputs, width, kernel, *, stride=1, groups=1, active=True):
        weight = generator.normal(0, (2 / (width * kernel**2)) ** 0.5, (outputs, width, kernel, kernel))
        for part, array in (("weight", weight), ("bias", generator.normal(0, 0.1, outputs))):
            constants.append(numpy_helper.from_array(array.astype(np.float32), f"{name}.{part}"))
        pads = [kernel // 2] * 4
        out = f"{name}.conv" if active else name
        inputs = [source, f"{name}.weight", f"{name}.bias"]
        nodes.append(helper.make_node("Conv", inputs, [out], name, strides=[stride] * 2, group=groups, pads=pads))
        if active:
            bounds = ["zero", "six"] if activation == "Clip" else []
            nodes.append(helper.make_node(activation, [out, *bounds], [name], f"{name}.act"))
        return name

    stem = conv("stem", "images", 8, 3, 3, stride=2)
    project = conv("project", stem, 8, 8, 1, active=False)
    wide = conv("expand", project, 16, 8, 1)
    deep = conv("depthwise", wide, 16, 1, 3, groups=16)
    narrow = conv("narrow", deep, 8, 16, 1, active=False)
    nodes.append(helper.make_node("Add", [project, narrow], ["sum"], "add"))
    head = conv("head", "sum", 16, 8, 1)
    nodes.append(helper.make_node("GlobalAveragePool", [head], ["pooled"], "pool"))
    nodes.append(helper.make_node("Flatten", ["pooled"], ["flat"], "flatten"))
    constants.append(numpy_helper.from_array(generator.normal(0, 0.5, (CLASSES, 16)).astype(np.float32), "fc.weight"))
    constants.append(numpy_helper.from_array(generator.normal(0, 0.1, CLASSES).astype(np.float32), "fc.bias"))
    nodes.append(helper.make_node("Gemm", ["flat", "fc.weight", "fc.bias"], ["scores"], "fc", transB=1))
    graph = helper.make_graph(
        nodes,
        "mobile",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 3, SIDE, SIDE])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, [1, CLASSES])],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return onnx.shape_inference.infer_shapes(model)


def images(count: int = 8) -> np.ndarray:
    """Normalised images ``(N, 3, 32, 32)``, smooth as photographs are."""
    generator = np.random.default_rng(1)
    coarse = generator.normal(size=(count, 3, 8, 8)).repeat(4, 2).repeat(4, 3)
    return (coarse + 0.2 * generator.normal(size=(count, 3, SIDE, SIDE))).astype(np.float32)


def quantize_static(folder: Path, model: onnx.ModelProto, **options) -> Path:
    """What ONNX Runtime's own quantizer makes of a model."""
    from onnxruntime import quantization

    class Reader(quantization.CalibrationDataReader):
        def __init__(self):
            self.images = iter(images())

        def get_next(self):
            image = next(self.images, None)
            return None if image is None else {"images": image[None]}

    source, target = folder / "float.onnx", folder / "quantized.onnx"
    onnx.save(model, source)
    quantization.quantize_static(source, target, Reader(), **options)
    return target


def with_channel_scales(path: Path, tensor: str) -> Path:
    """Give an activation's pair one scale a channel, the largest as before, as NNCF does before depthwise ones."""
    model = onnx.load(path)
    arrays = {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}
    (quantize,) = (n for n in model.graph.node if n.op_type == "QuantizeLinear" and n.input[0] == tensor)
    pair = [quantize, *(n for n in model.graph.node if quantize.output[0] in n.input)]
    channels = 16
    shares = np.linspace(0.5, 1, channels).astype(np.float32)
    scale = arrays[quantize.input[1]] * shares
    zero = np.full(channels, arrays[quantize.input[2]])
    for name, array in (("channel_scale", scale.astype(np.float32)), ("channel_zero", zero)):
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    for node in pair:
        node.input[1], node.input[2] = "channel_scale", "channel_zero"
        node.attribute.append(helper.make_attribute("axis", 1))
    onnx.save(model, path)
    return path
