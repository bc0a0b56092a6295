from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import openvino
from torch import nn

from deploykit.backends.backend import LowerOptions
from deploykit.backends.openvino.flatten_spatial import flatten_spatial
from deploykit.backends.openvino.linear_to_conv import linear_to_conv
from deploykit.backends.openvino.lower import lower
from deploykit.backends.openvino.passes import DIALECT
from deploykit.onnx_session import onnx_session
from tests.calibration.networks import master_graph, plan_of, rounding_noise_db

IMAGES = np.random.default_rng(0).normal(size=(3, 3, 16, 16)).astype(np.float32)


class Windows(nn.Module):
    """A linear layer on the tokens of an image, one on its windows, one on its map, and one on its mean."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.tokens, self.windows, self.map, self.head = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, images):
        maps = self.stem(images).permute(0, 2, 3, 1)
        windows = self.windows(self.map(maps).relu().reshape(-1, 64, 16)).relu()
        tokens = self.tokens(windows.reshape(-1, 256, 16)).relu()
        return tokens, self.head(tokens.mean(1))


def test_linear_layers_of_tokens_become_convolutions_with_the_same_numbers():
    graph = master_graph(Windows(), ("tokens", "head"), IMAGES)
    plan = plan_of(graph, IMAGES)
    written, plain = (
        replace(DIALECT, int8=tuple(step for step in DIALECT.int8 if step not in left_out))
        .render(graph, plan, IMAGES)
        .graph.model
        for left_out in ((flatten_spatial,), (flatten_spatial, linear_to_conv))
    )
    onnx.checker.check_model(ir.to_proto(written), full_check=True)
    kinds, before = (Counter(node.op_type for node in model.graph) for model in (written, plain))
    assert kinds["Conv"] == before["Conv"] + 1 == 2
    assert sum(kinds[kind] for kind in ("MatMul", "Gemm")) == 3
    found, expected = (onnx_session(model).run(None, {"images": IMAGES[:1]}) for model in (written, plain))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_openvino_runs_every_linear_layer_of_a_transformer_as_an_integer_convolution(tokens, tmp_path):
    engine = lower(DIALECT.render(tokens.graph, tokens.plan, tokens.images).graph, tmp_path, LowerOptions())
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(str(tmp_path / engine.file), "CPU", settings)
    kernels = Counter()
    for node in compiled.get_runtime_model().get_ordered_ops():
        kind, precision = (node.get_rt_info()[key].astype(str) for key in ("layerType", "runtimePrecision"))
        kernels[kind, precision] += 1
    assert kernels["Convolution", "u8"] + kernels["Convolution", "i8"] == len(tokens.plan.placement.weights) - 1
    assert not kernels["FullyConnected", "f32"]
    runs = [compiled([image[None]]) for image in tokens.images]
    found = [np.concatenate([run[index] for run in runs]) for index in range(len(tokens.graph.outputs))]
    assert min(rounding_noise_db(tokens.run(), found)) > 25
