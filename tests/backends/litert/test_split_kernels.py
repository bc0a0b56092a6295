"""Depthwise kernels of more places than LiteRT's delegate has: four convolutions with the same sum, in float."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

from deploykit.backends.litert.passes import DIALECT
from deploykit.backends.litert.split_kernels import split_kernels
from deploykit.calibration.torch_integers import copy_of
from tests.calibration.conftest import Case
from tests.calibration.networks import both_forms, conv_norm, plan_of

CONVOLUTION = torch.ops.aten.conv2d.default


class Large(nn.Module):
    """A depthwise convolution between two others."""

    outputs = ("stage1",)

    def __init__(self, kernel: int, stride: int = 1, groups: int = 16) -> None:
        super().__init__()
        self.stem = conv_norm(3, 16, 3, 2)
        self.large = nn.Conv2d(16, 16, kernel, stride, kernel // 2, groups=groups)
        self.last = nn.Conv2d(16, 16, 1)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (self.last(nn.functional.gelu(self.large(self.stem(images)))),)


def _convolutions(module: GraphModule) -> list[list[int]]:
    """The shape of the kernel of each convolution, in order."""
    return [list(node.args[1].meta["val"].shape[2:]) for node in module.graph.nodes if node.target == CONVOLUTION]


def _case(network: nn.Module, residual: Case) -> Case:
    master = both_forms(network, Large.outputs, residual.images)
    plan = plan_of(master.onnx, residual.images)
    return Case(graph=master.onnx, program=master.torch, images=residual.images, plan=plan)


def test_even_and_odd_places_have_the_same_sum(residual: Case):
    case = _case(Large(7), residual)
    module, image = copy_of(case.program.program), torch.from_numpy(residual.images[:1])
    with torch.no_grad():
        (before,) = module(image)
        assert split_kernels(module) == 1
        module.graph.lint()
        module.recompile()
        (after,) = module(image)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


def test_both_precisions_have_the_parts_in_float(residual: Case):
    case = _case(Large(7), residual)
    plan = DIALECT.keep_float(case.graph.model, case.plan)
    assert len(plan.placement.weights) == 1 and "places" in " ".join(plan.placement.float_nodes.values())
    for precision in (None, plan):
        program = DIALECT.render(case.program, precision, case.images).graph.program
        assert _convolutions(program.graph_module) == [[3, 3], [4, 4], [4, 3], [3, 4], [3, 3], [1, 1]]


@pytest.mark.parametrize(
    "network", [Large(5), Large(7, stride=2), Large(7, groups=8)], ids=["small", "stride", "groups"]
)
def test_others_stay(residual: Case, network):
    case = _case(network, residual)
    assert split_kernels(copy_of(case.program.program)) == 0
    assert DIALECT.render(case.program, None, case.images).graph is case.program
    kept = DIALECT.keep_float(case.graph.model, case.plan).placement.float_nodes
    assert not [reason for reason in kept.values() if "places" in reason]
