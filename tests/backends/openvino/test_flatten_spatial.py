from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import openvino
import torch
from torch import nn

from deploykit.backends.backend import LowerOptions
from deploykit.backends.openvino.flatten_spatial import flatten_spatial
from deploykit.backends.openvino.lower import lower
from deploykit.backends.openvino.passes import DIALECT
from deploykit.onnx_session import onnx_session
from tests.calibration.networks import master_graph, plan_of, rounding_noise_db

IMAGES = np.random.default_rng(0).normal(size=(3, 3, 16, 16)).astype(np.float32)


class Next(nn.Module):
    """A block of ConvNeXt, and a linear layer on the rolled map behind it as Swin has one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depthwise = nn.Conv2d(3, 32, 4, 4), nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.norm, self.last_norm = nn.LayerNorm(32), nn.LayerNorm(32)
        self.first, self.second, self.rolled = nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 48)

    def forward(self, images):
        maps = self.stem(images)
        mixed = self.second(nn.functional.gelu(self.first(self.norm(self.depthwise(maps).permute(0, 2, 3, 1)))))
        maps = maps + mixed.permute(0, 3, 1, 2)
        normed = self.last_norm(maps.permute(0, 2, 3, 1))
        return normed, self.rolled(torch.roll(normed, (-1, -1), (1, 2)))


def prepared():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        graph = master_graph(Next(), ("normed", "maps"), IMAGES)
    return graph, plan_of(graph, IMAGES)


def outputs(model: ir.Model) -> list[np.ndarray]:
    return onnx_session(model).run(None, {"images": IMAGES[:1]})


def test_linears_and_norms_see_tokens_and_the_numbers_stay():
    graph, plan = prepared()
    model = graph.model.clone()
    assert flatten_spatial(model, plan) is plan
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    shapes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in onnx.shape_inference.infer_shapes(proto).graph.value_info
    }
    for node in proto.graph.node:
        if node.op_type in ("MatMul", "Gelu") or (node.op_type == "LayerNormalization" and node.output[0] != "normed"):
            assert len(shapes[node.input[0]]) == 3, node.op_type
    assert [value.name for value in model.graph.outputs] == ["normed", "maps"]
    assert {use.input for use in plan.placement.weights.values()} <= shapes.keys() | {"images", "normed"}
    for one, other in zip(outputs(model), outputs(graph.model), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_no_zero_point_is_subtracted_by_itself_and_every_product_is_in_integers(tmp_path):
    graph, plan = prepared()
    engine = lower(DIALECT.render(graph, plan, IMAGES).graph, tmp_path, LowerOptions())
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(str(tmp_path / engine.file), "CPU", settings)
    kernels = [
        tuple(
            str(node.get_rt_info()[key].astype(str)) for key in ("layerType", "runtimePrecision", "originalLayersNames")
        )
        for node in compiled.get_runtime_model().get_ordered_ops()
    ]
    products = [kernel for kernel in kernels if kernel[0] in ("Convolution", "FullyConnected")]
    assert len(products) == len(plan.placement.weights) == 5
    assert {precision for _, precision, _ in products} <= {"u8", "i8"}
    assert not [kernel for kernel in kernels if kernel[0] == "Eltwise" and "DequantizationSubtract" in kernel[2]]
    found = list(compiled([IMAGES[:1]]).values())
    assert min(rounding_noise_db(outputs(graph.model), found)) > 25


def test_the_plan_reads_the_same_tensors():
    graph, plan = prepared()
    without = replace(DIALECT, int8=tuple(step for step in DIALECT.int8 if step is not flatten_spatial))
    assert len(without.int8) == len(DIALECT.int8) - 1
    flat, plain = (dialect.render(graph, plan, IMAGES).graph.model for dialect in (DIALECT, without))
    quantized = [
        sorted(node.name for node in model.graph if node.op_type == "QuantizeLinear") for model in (flat, plain)
    ]
    assert quantized[0] == quantized[1]
    for one, other in zip(outputs(flat), outputs(plain), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)
