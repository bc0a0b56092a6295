"""A norm's gain before a planned linear is no factor of its own, and the numbers stay."""

from __future__ import annotations

import torch
from torch import nn

from deploykit.backends.litert.gained_norms import keep_gains
from deploykit.fusion.program import export_program
from deploykit.spec import InputSpec


class Norms(nn.Module):
    """A norm with a gain before a linear of integers; one before a linear of floats."""

    def __init__(self):
        super().__init__()
        self.gained, self.plain = nn.LayerNorm(8, eps=0.1), nn.LayerNorm(8)
        self.gained.weight.data, self.gained.bias.data = torch.linspace(0.5, 2, 8), torch.linspace(-1, 1, 8)
        self.register_buffer("integers", torch.arange(-20, 20, dtype=torch.int8).reshape(5, 8))
        self.register_buffer("scales", torch.linspace(0.01, 0.1, 5))
        self.register_buffer("zeros", torch.zeros(5, dtype=torch.int64))
        self.floats = nn.Linear(8, 3)

    def forward(self, images):
        weight = torch.ops.quantized_decomposed.dequantize_per_channel(
            self.integers, self.scales, self.zeros, 0, -127, 127, torch.int8
        )
        return nn.functional.linear(self.gained(images), weight), self.floats(self.plain(images))


def test_a_gain_before_a_planned_linear_is_joined_with_the_deviation():
    module = export_program(Norms().eval(), InputSpec(height=8, width=8)).module()
    images = torch.linspace(-1, 2, 192).reshape(1, 3, 8, 8)
    expected = module(images)
    keep_gains(module)
    module.recompile()
    (left,) = module.graph.find_nodes(op="call_function", target=torch.ops.aten.layer_norm.default)
    assert left.args[2].target == "plain.weight"
    factors = [
        node
        for node in module.graph.find_nodes(op="call_function", target=torch.ops.aten.mul.Tensor)
        if any(source.target == "gained.weight" for source in node.all_input_nodes)
    ]
    assert [source.target for factor in factors for source in factor.all_input_nodes] == [
        torch.ops.aten.rsqrt.default,
        "gained.weight",
    ]
    for one, two in zip(expected, module(images), strict=True):
        torch.testing.assert_close(two, one)
