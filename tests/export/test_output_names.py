"""Outputs of any name, in the graph itself and in what an engine gives."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import nn

from deploykit import create_backbone
from deploykit.backbones.user_module import wrap_module
from deploykit.export.to_onnx import to_onnx
from deploykit.export.trace import output_names, trace
from deploykit.onnx_session import onnx_session
from deploykit.spec import InputSpec


class Net(nn.Module):
    """Two maps, the images and a constant, under the names that ``give`` chooses."""

    def __init__(self, give):
        super().__init__()
        self.c, self.d = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1)
        self.pos = nn.Parameter(torch.randn(1, 4, 8, 8))
        self.give = give

    def forward(self, images):
        low = self.c(images)
        return self.give(self, images, low, self.d(low.relu()))


GIVEN = {
    "internal": lambda net, x, low, high: {"relu": low, "conv2d": high, "conv2d_1": low * 2, "output_1": high * 2},
    "parameters": lambda net, x, low, high: {"backbone.module.c.weight": low, "c.weight": high, "d.bias": high + 1},
    "input": lambda net, x, low, high: {"images": low, "input_0": high, "embedding": high * 2, "logits": low * 2},
    "odd": lambda net, x, low, high: {
        "a/b": low,
        "ü ñ": high,
        "a,b:0": high + 1,
        "../x\\": low + 1,
        "'q\"<&>": low * 2,
    },
    "twice": lambda net, x, low, high: {"a": low, "b": low, "c": {"d": high, "e": [high, None]}},
    "images": lambda net, x, low, high: {"same": x, "high": high},
    "constant": lambda net, x, low, high: {"pos": net.pos.expand(len(x), -1, -1, -1), "zeros": low * 0, "high": high},
    "region": lambda net, x, low, high: {
        "true_graph_0": torch.cond(low.sum() > 0, lambda t: t * 2, lambda t: t + 1, (low,)),
        "mul": high,
    },
}


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's own, in an eager torch.cond
@pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN)
def test_a_graph_has_the_names_that_the_module_gives(given):
    backbone = wrap_module(Net(given), 32)
    spec = InputSpec(name=backbone.input_spec.name, height=32, width=32)
    model = to_onnx(trace(backbone, spec), spec, output_names(backbone))
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    session = onnx_session(model)
    images = torch.randn(1, 3, 32, 32)
    expected = backbone(images)
    assert [output.name for output in model.graph.outputs] == list(expected)
    for name, found in zip(expected, session.run(None, {spec.name: images.numpy()}), strict=True):
        np.testing.assert_allclose(found, expected[name].detach(), atol=1e-5)


@pytest.mark.parametrize(
    ("runtime", "precision", "given"),
    [("openvino", "fp32", "odd"), ("onnxruntime", "int8", "input"), ("openvino", "int8", "parameters")],
)
def test_an_engine_gives_every_name(runtime, precision, given):
    torch.manual_seed(0)
    module = Net(GIVEN[given])
    images = np.random.default_rng(0).standard_normal((24, 3, 32, 32)).astype(np.float32)
    settings = {"calibration": images} if precision == "int8" else {}
    engine = create_backbone(module, runtime=runtime, precision=precision, image_size=32, cache=False, **settings)
    expected, found = create_backbone(module, image_size=32)(images[:1]), engine(images[:1])
    assert list(found) == list(expected)
    for name, features in expected.items():
        error = np.square(found[name] - features).sum() / np.square(features).sum()
        assert error < (1e-8 if precision == "fp32" else 1e-2), name


def test_top_1_is_not_taken_of_a_map_called_logits():
    module = Net(lambda net, x, low, high: {"logits": high})
    engine = create_backbone(module, runtime="onnxruntime", image_size=32, cache=False)
    assert engine(np.zeros((1, 3, 32, 32), np.float32))["logits"].shape == (1, 8, 8, 8)
