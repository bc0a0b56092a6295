from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

from deploykit.errors import FusionError
from deploykit.fusion.onnx_passes import OnnxPass, run_onnx_passes
from deploykit.fusion.pipeline import EXACT_DB
from tests.fusion.graphs import images
from tests.fusion.onnx_graphs import graph_of


def chaotic():
    """A network that enlarges every rounding many times over."""

    def forward(m, x):
        x = m.linear(x.flatten(1))
        for _ in range(6):
            x = torch.sin(4 * x)
        return x

    torch.manual_seed(0)
    return graph_of(forward, linear=nn.Linear(4 * 12 * 12, 64))


def scaled_by(factor: float):
    """A pass that multiplies the first layer by a factor and divides what it gives by 3."""

    def rewrite(model: ir.Model) -> int:
        product = next(node for node in model.graph if node.op_type == "Gemm")
        for value in product.inputs[1:]:
            value.const_value = ir.tensor(value.const_value.numpy() * np.float32(factor), name=value.name)
        third = ir.tensor(np.array(3, np.float32), name="third")
        value = ir.Value(name="third", const_value=third, shape=ir.Shape(()), type=ir.TensorType(third.dtype))
        model.graph.register_initializer(value)
        divided = ir.node("Div", [product.outputs[0], value], name="divided")
        divided.outputs[0].name = "divided"
        model.graph.insert_after(product, divided)
        ir.convenience.replace_all_uses_with(product.outputs[0], divided.outputs[0])
        divided.replace_input_with(0, product.outputs[0])
        return 1

    return rewrite


def run(rewrite):
    step = OnnxPass(name="it", rewrite=rewrite, min_sqnr_db=EXACT_DB)
    return run_onnx_passes(chaotic(), images(count=2).numpy(), (step,))


def test_an_exact_pass_is_held_to_what_rounding_leaves():
    _, (record,) = run(scaled_by(3.0))
    assert record.rewrites == 1
    assert 50 < record.sqnr_db < 95


def test_more_than_rounding_is_told():
    with pytest.raises(FusionError, match=r"'it' changed the numbers: \d+\.\d dB.*promises 100"):
        run(scaled_by(3.0001))
