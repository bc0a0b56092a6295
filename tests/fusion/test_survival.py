"""What is left of each family once its runtime has compiled the graph: the runtime's own view of it."""

from __future__ import annotations

import contextlib
import functools
import io
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from deploykit.backbones.base import BackboneOptions
from deploykit.backbones.registry import build_backbone
from deploykit.backends.backend import resolve
from deploykit.backends.table import load_backend
from deploykit.export.graphs import output_specs, select
from deploykit.export.to_onnx import OPSET, to_onnx
from deploykit.export.trace import output_names, trace
from deploykit.fusion.pipeline import fuse
from deploykit.graph import OnnxGraph
from deploykit.spec import BatchRange, InputSpec
from tests.backbones.realistic import randomize
from tests.small_transformers import SHORT_VIT

FAMILIES = {
    "resnet18": 64,
    "efficientnet_b0": 64,
    "mobilenetv3_small_075": 64,
    "regnety_002": 64,
    "vit_tiny_patch16_224": 64,
    SHORT_VIT: 64,
    "swin_tiny_patch4_window7_224": 56,
    "convnext_atto": 64,
    "convnext_tiny": 64,
    "mobilevit_s": 64,
}
SHAPES_STAY = (
    "regnety_002",
    "convnext_atto",
    "efficientnet_b0",
    "mobilenetv3_small_075",
    "swin_tiny_patch4_window7_224",
    "convnext_tiny",
    "mobilevit_s",
)
"""Families of which OpenVINO computes some shape itself."""
NEVER = {
    "BatchNormalization",
    "Cast",
    "ConstantOfShape",
    "Dropout",
    "Expand",
    "Gather",
    "Identity",
    "Pad",
    "Range",
    "Shape",
    "Where",
}
"""Statistics, leftovers of training, shape arithmetic: nothing of it may reach a runtime."""

families = pytest.mark.parametrize(
    "name", [name if name == "resnet18" else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)


@functools.cache
def master(name: str) -> OnnxGraph:
    """The logits of a small variant at a small size, fused, for any batch."""
    backbone = randomize(build_backbone(name, BackboneOptions(image_size=(FAMILIES[name], FAMILIES[name])))).eval()
    spec = InputSpec(batch=BatchRange(), height=FAMILIES[name], width=FAMILIES[name])
    images = np.random.default_rng(0).normal(size=(2, *spec.shape[1:])).astype(np.float32)
    program = fuse(trace(backbone, spec), spec, images).program
    model = to_onnx(program, spec, output_names(backbone))
    return select(OnnxGraph(input=spec, outputs=output_specs(model), model=model), ("logits",))


@functools.cache
def in_onnxruntime(name: str) -> Counter[str]:
    """Operators of the graph that ONNX Runtime runs."""
    return optimized(float_model(name, "onnxruntime"))


def float_model(name: str, runtime: str) -> ir.Model:
    """The graph that a runtime's own dialect gives it in FP32."""
    graph = master(name)
    images = np.random.default_rng(0).normal(size=(2, *graph.input.shape[1:])).astype(np.float32)
    return resolve(load_backend(runtime).dialect).render(graph, None, images).graph.model


def optimized(model: ir.Model) -> Counter[str]:
    """Operators of what ONNX Runtime makes of a graph."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        onnxruntime.InferenceSession(
            ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        return Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)


@functools.cache
def in_openvino(name: str) -> Counter[str]:
    """Layers of the graph that OpenVINO runs."""
    openvino = pytest.importorskip("openvino", reason="openvino is not installed")
    core = openvino.Core()
    model = core.read_model(ir.to_proto(float_model(name, "openvino")).SerializeToString())
    model.reshape([1, *master(name).input.shape[1:]])
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    operations = compiled.get_runtime_model().get_ordered_ops()
    return Counter(operation.get_rt_info()["layerType"].astype(str) for operation in operations)


ALLOWED = {
    # Room for the class token, and the token.
    "vit_tiny_patch16_224": {"Pad", "Gather"},
    SHORT_VIT: {"Pad", "Gather"},
    # Windows that so small a map does not fill; whole tokens are gathered into windows.
    "swin_tiny_patch4_window7_224": {"Pad", "Gather"},
}


@families
def test_nothing_of_training_and_no_shape_arithmetic_reaches_a_runtime(name):
    unwanted = NEVER - ALLOWED.get(name, set())
    assert not unwanted & {node.op_type for node in master(name).model.graph}
    assert not unwanted & set(in_onnxruntime(name))
    assert not {"Broadcast", "ShapeOf", "Concatenation", "Gather"} & set(in_openvino(name)) or name in SHAPES_STAY


@pytest.mark.parametrize(
    ("name", "convolutions"), [("resnet18", 20), pytest.param("regnety_002", 70, marks=pytest.mark.slow)]
)
def test_convolutions_take_their_norms_activations_and_residuals(name, convolutions):
    found, in_other = in_onnxruntime(name), in_openvino(name)
    assert found["Conv"] + found["FusedConv"] == in_other["Convolution"] == convolutions
    assert not {"Relu", "Add", "BatchNormalization"} & set(found)
    assert not {"Eltwise", "MathActivation"} & set(in_other)


def test_a_plain_network_has_no_node_that_timms_has_not(timm):
    model = timm.create_model("resnet18").eval()
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own deprecations while it exports
        program = torch.onnx.export(
            model, (torch.zeros(1, 3, 64, 64),), dynamo=True, opset_version=OPSET, optimize=True, verbose=False
        )
    assert program is not None
    assert in_onnxruntime("resnet18") <= optimized(program.model)


@pytest.mark.parametrize(
    ("name", "blocks"), [(SHORT_VIT, 3), pytest.param("vit_tiny_patch16_224", 12, marks=pytest.mark.slow)]
)
def test_attention_is_one_operator_in_onnxruntime(name, blocks):
    found = in_onnxruntime(name)
    assert found["Attention"] == blocks - 1, "the last block has queries for the class token alone"
    assert (found["Gelu"], found["BiasGelu"]) == (blocks, 0), "the bias is in the layer before"
    layers = 3 * blocks + 2, 2, 0
    assert (found["Gemm"], found["MatMul"], found["FusedMatMul"]) == layers, "two products of the last attention"
    assert found["Softmax"] == 1
    assert found["Mul"] == 0, "every scale is in its projection"
    in_other = in_openvino(name)
    layers = 6 * blocks - 1, 2 * blocks + 1
    assert (in_other["FullyConnected"], in_other["MVN"]) == layers, "all attentions but one have three projections each"
    assert in_other["Split"] == 1, "of the last attention"


@pytest.mark.slow
def test_attention_of_windows_is_one_operator_where_they_share_a_bias():
    found = in_onnxruntime("swin_tiny_patch4_window7_224")
    assert (found["Attention"], found["Softmax"]) == (11, 1), "one block is shifted, and the batch is any"
    assert found["Mul"] == 0, "every scale is in its projection"
    assert (found["Gelu"], found["BiasGelu"]) == (12, 0)
    in_other = in_openvino("swin_tiny_patch4_window7_224")
    assert (in_other["MVN"], in_other["RMS"]) == (29, 0), "norms over tokens are one operator"


@pytest.mark.slow
def test_attention_of_mobilevit_is_one_operator():
    found = in_onnxruntime("mobilevit_s")
    assert found["Attention"] == 9
    assert found["Softmax"] == 0
    assert found["QuickGelu"] == 34, "sigmoid and product stay one operator"


@pytest.mark.slow
def test_layer_scale_of_convnext_is_gone():
    found = Counter(node.op_type for node in master("convnext_atto").model.graph)
    assert found["Mul"] == 0, "layer scale is in the convolution before it"
    assert found["LayerNormalization"] == 17
    assert in_onnxruntime("convnext_atto")["LayerNormalization"] == 17
    in_other = in_openvino("convnext_atto")
    assert (in_other["MVN"], in_other["RMS"]) == (17, 0)


@pytest.mark.slow
def test_mlps_of_convnext_are_convolutions():
    found = in_onnxruntime("convnext_tiny")
    assert (found["Conv"], found["Gemm"], found["MatMul"]) == (4 + 3 * 18, 1, 0)
    assert found["Add"] == 0, "convolutions take biases and residuals along"
    in_other = in_openvino("convnext_tiny")
    assert (in_other["FullyConnected"], in_other["Convolution"]) == (18 + 1, 4 + 18)
    assert in_other["Eltwise"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["regnety_002", "efficientnet_b0"])
def test_squeeze_and_excitation_stays_in_onnxruntimes_blocked_layout(name):
    found = in_onnxruntime(name)
    gates = {"regnety_002": 13, "efficientnet_b0": 16}[name]
    plain = found["ReduceMean"] - 1  # gates of layers with no whole fours of inputs; the head has the other mean
    assert 0 < found["Upsample"] == found["GlobalAveragePool"] == gates - plain
    assert found["Resize"] == 0
