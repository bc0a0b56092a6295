from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import openvino
import torch
from torch import nn

from deploykit.backends.backend import LowerOptions
from deploykit.backends.openvino.lower import lower
from deploykit.backends.openvino.passes import DIALECT
from deploykit.onnx_session import onnx_session
from tests.calibration.networks import master_graph, plan_of, rounding_noise_db


def compile_engine(graph, folder):
    engine = lower(graph, folder, LowerOptions())
    return openvino.Core().compile_model(str(folder / engine.file), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})


def test_every_planned_convolution_runs_in_integers(case, tmp_path):
    compiled = compile_engine(DIALECT.render(case.graph, case.plan, case.images).graph, tmp_path)
    kernels = [
        {key: str(node.get_rt_info()[key].astype(str)) for key in ("layerType", "runtimePrecision", "primitiveType")}
        for node in compiled.get_runtime_model().get_ordered_ops()
        if "layerType" in node.get_rt_info()
    ]
    convolutions = [kernel for kernel in kernels if "Convolution" in kernel["layerType"]]
    floats = [kernel for kernel in convolutions if kernel["runtimePrecision"] not in ("i8", "u8")]
    assert len(convolutions) >= 8
    assert len(floats) == len(DIALECT.keep_float(case.graph.model, case.plan).placement.float_nodes), floats


def test_the_numbers_stay_near_fp32(case, tmp_path):
    compiled = compile_engine(DIALECT.render(case.graph, case.plan, case.images).graph, tmp_path)
    runs = [compiled([image[None]]) for image in case.images]
    found = [[run[index] for run in runs] for index in range(len(case.graph.outputs))]
    assert min(rounding_noise_db(case.run(), [np.concatenate(parts) for parts in found])) > 12


class Rolled(nn.Module):
    """A linear layer on a map of shape (N, H, W, C) that was rolled, as in a shifted window."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.linear = nn.Linear(16, 32)

    def forward(self, images):
        rolled = torch.roll(self.stem(images).permute(0, 2, 3, 1), (-2, -2), (1, 2))
        return (self.linear(rolled),)


def test_a_matrix_product_behind_a_rolled_map_runs_in_integers(tmp_path):
    images = np.random.default_rng(0).standard_normal((4, 3, 16, 16)).astype(np.float32)
    master = master_graph(Rolled(), ("tokens",), images)
    rendered = DIALECT.render(master, plan_of(master, images), images).graph
    onnx.checker.check_model(ir.to_proto(rendered.model), full_check=True)
    compiled = compile_engine(rendered, tmp_path)
    products = [
        str(node.get_rt_info()["runtimePrecision"].astype(str))
        for node in compiled.get_runtime_model().get_ordered_ops()
        if node.get_rt_info()["layerType"].astype(str) in ("FullyConnected", "Convolution")
    ]
    assert len(products) == 2
    assert set(products) <= {"i8", "u8"}
    found = [compiled([image[None]])["tokens"] for image in images]
    (expected,) = zip(*(onnx_session(master.model).run(None, {"images": image[None]}) for image in images), strict=True)
    assert rounding_noise_db([np.concatenate(expected)], [np.concatenate(found)])[0] > 30
