"""Parts of a concatenation are rounded to the steps of the whole, which changes no number."""

from __future__ import annotations

import torch
from torch import nn

from deploykit.backends.executorch.concatenation import round_parts
from deploykit.fusion.program import export_program
from deploykit.spec import InputSpec

OPERATORS = torch.ops.quantized_decomposed
FINE, COARSE = (0.01, 0, -128, 127, torch.int8), (0.03, -5, -128, 127, torch.int8)


def rounded(values: torch.Tensor, settings: tuple[object, ...]) -> torch.Tensor:
    return OPERATORS.dequantize_per_tensor(OPERATORS.quantize_per_tensor(values, *settings), *settings)


class Joined(nn.Module):
    """Two concatenations of a part in fine steps and one in coarse steps; the first is rounded to coarse steps."""

    def forward(self, images):
        fine, coarse = rounded(images, FINE), rounded(images * 3, COARSE)
        return rounded(torch.cat((fine, coarse), 1), COARSE), torch.cat((fine, coarse), 2)


def test_the_parts_of_a_rounded_concatenation_have_its_steps():
    module = export_program(Joined(), InputSpec(height=8, width=8)).module()
    images = torch.linspace(-1, 2, 192).reshape(1, 3, 8, 8)
    expected = module(images)
    round_parts(module)
    module.recompile()
    joined, other = module.graph.find_nodes(op="call_function", target=torch.ops.aten.cat.default)
    assert {part.args[1] for part in joined.all_input_nodes} == {COARSE[0]}
    assert {part.args[1] for part in other.all_input_nodes} == {FINE[0], COARSE[0]}
    for one, two in zip(expected, module(images), strict=True):
        assert torch.equal(one, two)
