from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from deploykit.fusion.embed_preprocessing import embed_preprocessing
from deploykit.fusion.program import export_program
from deploykit.graph import OnnxGraph, TorchProgram
from deploykit.images.preprocess import normalize
from deploykit.onnx_session import onnx_session
from deploykit.parity.metrics import sqnr_db
from deploykit.spec import BatchRange, InputSpec, Preprocessing, TensorSpec

SPEC = InputSpec(batch=2, height=10, width=12)
EXACT_DB = 100.0


def pixels(spec: InputSpec = SPEC, seed: int = 0, count: int = 2) -> np.ndarray:
    shape = (count, spec.height, spec.width, spec.channels)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def graph_of(nodes: list[onnx.NodeProto], constants: dict[str, np.ndarray], spec: InputSpec = SPEC) -> OnnxGraph:
    """A graph from ``images`` to ``y`` in FP32."""
    made = helper.make_graph(
        nodes,
        "stem",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, spec.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", "c", "h", "w"])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return OnnxGraph(input=spec, outputs=(TensorSpec(name="y", shape=("batch", 1)),), model=ir.from_proto(model))


def stem_of(
    *, spec: InputSpec = SPEC, kernel: int = 3, bias: bool = True, group: int = 1, seed: int = 0, **attributes: object
) -> OnnxGraph:
    """One convolution of six outputs."""
    generator = np.random.default_rng(seed)
    weight = generator.normal(size=(6, spec.channels // group, kernel, kernel)).astype(np.float32)
    constants = {"weight": weight, **({"bias": generator.normal(size=6).astype(np.float32)} if bias else {})}
    nodes = [helper.make_node("Conv", ["images", *constants], ["y"], name="stem", group=group, **attributes)]
    return graph_of(nodes, constants, spec)


def embedded_numbers(graph: OnnxGraph, given: np.ndarray) -> float:
    """The SQNR in dB of an embedded graph against the float graph on normalised images."""
    expected = onnx_session(graph.model).run(["y"], {"images": normalize(given, graph.input.preprocessing)})[0]
    embedded = embed_preprocessing(graph, graph.input.as_pixels())
    onnx.checker.check_model(ir.to_proto(embedded.model), full_check=True)
    return sqnr_db(expected, onnx_session(embedded.model).run(["y"], {"images": given})[0])


def operators(graph: OnnxGraph) -> list[str]:
    return [node.op_type for node in embed_preprocessing(graph, graph.input.as_pixels()).model.graph]


@settings(max_examples=40, deadline=None)
@given(
    kernel=st.integers(1, 4),
    strides=st.sampled_from([[1, 1], [2, 2], [2, 1]]),
    dilation=st.integers(1, 2),
    padding=st.sampled_from([[0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 1, 1], [3, 2, 1, 0], "SAME_UPPER", "SAME_LOWER"]),
    bias=st.booleans(),
    channels=st.sampled_from([1, 3, 4]),
    statistics=st.tuples(st.floats(0, 1), st.floats(0.01, 1)),
    seed=st.integers(0, 99),
)
def test_every_stem_keeps_its_numbers_borders_included(
    *, kernel, strides, dilation, padding, bias, channels, statistics, seed
):
    mean, std = statistics
    how = Preprocessing(mean=(mean, 0.5, 0.4, 0.3)[:channels], std=(std, 0.2, 0.3, 1.0)[:channels])
    spec = InputSpec(batch=2, channels=channels, height=10, width=12, preprocessing=how)
    attributes = {"auto_pad": padding} if isinstance(padding, str) else {"pads": padding}
    dilations = [1 if isinstance(padding, str) else dilation] * 2  # ONNX Runtime refuses both together
    graph = stem_of(spec=spec, kernel=kernel, bias=bias, seed=seed, strides=strides, dilations=dilations, **attributes)
    assert embedded_numbers(graph, pixels(spec, seed)) >= EXACT_DB
    padded = padding not in ([0, 0, 0, 0],)
    assert operators(graph) == ["Cast", *(["Sub"] if padded else []), "Transpose", "Conv"]


def test_the_border_of_black_and_white_images_is_exact():
    graph = stem_of(pads=[1, 1, 1, 1])
    for value in (0, 255):
        assert embedded_numbers(graph, np.full((2, 10, 12, 3), value, np.uint8)) >= EXACT_DB


NEAR_MISSES = {
    "grouped": lambda: stem_of(group=3),
    "an explicit pad": lambda: graph_of(
        [
            helper.make_node("Pad", ["images", "sides"], ["padded"], name="pad"),
            helper.make_node("Conv", ["padded", "weight"], ["y"], name="stem"),
        ],
        {"sides": np.array([0, 0, 1, 1, 0, 0, 1, 1]), "weight": np.ones((4, 3, 3, 3), np.float32)},
    ),
    "two readers": lambda: graph_of(
        [
            helper.make_node("Conv", ["images", "weight"], ["a"], name="stem"),
            helper.make_node("Add", ["a", "images"], ["y"], name="add"),
        ],
        {"weight": np.full((3, 3, 1, 1), 0.1, np.float32)},
    ),
    "a computed weight": lambda: graph_of(
        [
            helper.make_node("Mul", ["weight", "gain"], ["scaled"], name="gain"),
            helper.make_node("Conv", ["images", "scaled"], ["y"], name="stem"),
        ],
        {"weight": np.ones((4, 3, 3, 3), np.float32), "gain": np.array(0.5, np.float32)},
    ),
    "images as the weight": lambda: graph_of(
        [helper.make_node("Conv", ["x", "images"], ["y"], name="stem")], {"x": np.ones((1, 3, 16, 16), np.float32)}
    ),
    "a Q/DQ pair": lambda: graph_of(
        [
            helper.make_node("QuantizeLinear", ["images", "scale", "zero"], ["q"], name="q"),
            helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"], name="dq"),
            helper.make_node("Conv", ["d", "weight"], ["y"], name="stem"),
        ],
        {
            "scale": np.array(1e-4, np.float32),
            "zero": np.array(32768, np.uint16),
            "weight": np.ones((4, 3, 3, 3), np.float32),
        },
    ),
}


@pytest.mark.parametrize("case", NEAR_MISSES)
def test_where_the_stem_cannot_take_the_scale_it_is_written_out(case):
    graph = NEAR_MISSES[case]()
    assert embedded_numbers(graph, pixels()) >= EXACT_DB
    original = [node.op_type for node in graph.model.graph]
    assert operators(graph) == ["Cast", "Mul", "Add", "Transpose", *original]


def test_a_shared_weight_keeps_its_values_for_the_other_reader():
    nodes = [
        helper.make_node("Conv", ["images", "weight"], ["a"], name="stem"),
        helper.make_node("Conv", ["a", "weight"], ["y"], name="again"),
    ]
    graph = graph_of(nodes, {"weight": np.random.default_rng(0).normal(size=(3, 3, 3, 3)).astype(np.float32)})
    assert embedded_numbers(graph, pixels()) >= EXACT_DB


def test_the_graph_given_stays_as_it_is_and_a_float_input_asks_for_nothing():
    graph = stem_of()
    before = ir.to_proto(graph.model).SerializeToString()
    embedded = embed_preprocessing(graph, SPEC.as_pixels())
    assert ir.to_proto(graph.model).SerializeToString() == before
    assert embedded.input == SPEC.as_pixels()
    assert embedded.outputs == graph.outputs
    assert embed_preprocessing(graph, SPEC) is graph


def test_a_dynamic_batch_stays_dynamic():
    spec = InputSpec(batch=BatchRange(), height=10, width=12)
    graph = stem_of(spec=spec, pads=[1, 1, 1, 1])
    embedded = ir.to_proto(embed_preprocessing(graph, spec.as_pixels()).model)
    session = onnxruntime.InferenceSession(embedded.SerializeToString(), providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    assert (given.name, given.type, given.shape) == ("images", "tensor(uint8)", ["batch", 10, 12, 3])
    for count in (1, 5):
        assert session.run(["y"], {"images": pixels(count=count)})[0].shape[0] == count


class Stem(nn.Sequential):
    def forward(self, images):
        return (super().forward(images),)


@pytest.mark.parametrize("batch", [2, BatchRange()], ids=["static", "dynamic"])
def test_a_torch_program_takes_pixels(batch):
    spec = InputSpec(batch=batch, height=10, width=12)
    module = Stem(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU()).eval()
    outputs = (TensorSpec(name="y", shape=(2, 6)),)
    graph = TorchProgram(input=spec, outputs=outputs, program=export_program(module, spec))
    embedded = embed_preprocessing(graph, spec.as_pixels())
    for count in (2,) if isinstance(batch, int) else (1, 5):
        given = pixels(count=count)
        with torch.no_grad():
            (expected,) = module(torch.from_numpy(normalize(given, spec.preprocessing)))
            (found,) = embedded.program.module()(torch.from_numpy(given))
        assert sqnr_db(expected.numpy(), found.numpy()) >= EXACT_DB
