"""Roundings in front of which numbers are moved: float readers keep what is not rounded, to the same integers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from deploykit.backends.litert.unrounded_readers import keep_unrounded
from deploykit.calibration.integer_maps import write_integer_maps
from deploykit.calibration.torch_integers import copy_of, value_of
from tests.backbones.realistic import randomize
from tests.calibration.conftest import Case
from tests.calibration.networks import both_forms, plan_of

ATEN, DECOMPOSED = torch.ops.aten, torch.ops.quantized_decomposed


class Residual(nn.Module):
    """ConvNeXt's stem and the path around its first block; ``shared``: the path is there."""

    outputs = ("stage1",)

    def __init__(self, *, shared: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 4, 4)
        self.norm = nn.LayerNorm(16)
        self.layer = nn.Conv2d(16, 16, 3, padding=1)
        self.shared = shared

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        normed = self.norm(self.stem(images).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        inner = nn.functional.gelu(self.layer(normed))
        return (inner + normed if self.shared else inner,)


def _written(residual: Case, *, shared: bool) -> GraphModule:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = randomize(Residual(shared=shared))
    master = both_forms(module, Residual.outputs, residual.images)
    written = copy_of(master.torch.program)
    write_integer_maps(written, plan_of(master.onnx, residual.images), Residual.outputs)
    written.recompile()
    return written


def _layer(module: GraphModule) -> tuple[Node, Node, Node]:
    """The second convolution, what rounds its map, and the DQ of its weight."""
    layer = [node for node in module.graph.nodes if node.target == ATEN.conv2d.default][-1]
    restored, weight = layer.args[:2]
    return layer, restored.args[0], weight


def test_the_float_reader_is_told_from_the_integers(residual: Case):
    module = _written(residual, shared=True)
    _, rounded, weight = _layer(module)
    step, scales = rounded.args[1], value_of(module, weight.args[1])
    image = torch.from_numpy(residual.images[:1])
    with torch.no_grad():
        (before,) = module(image)
        keep_unrounded(module)
        module.graph.lint()
        module.recompile()
        (after,) = module(image)
    layer, rounded, weight = _layer(module)
    assert rounded.args[0].target == ATEN.mul.Tensor and rounded.args[1] == layer.args[0].args[1] == 2 * step
    assert torch.equal(value_of(module, weight.args[1]), scales / 2)
    assert torch.equal(before, after)


@pytest.mark.parametrize("kept", ["alone", "computed"])
def test_others_stay(residual: Case, kept):
    module = _written(residual, shared=kept == "computed")
    if kept == "computed":
        _, rounded, _ = _layer(module)
        with module.graph.inserting_before(rounded):
            summed = module.graph.call_function(ATEN.add.Tensor, (rounded.args[0], 1.0))
        rounded.args[0].replace_all_uses_with(summed, delete_user_cb=lambda user: user is not summed)
    before = [node.name for node in module.graph.nodes]
    keep_unrounded(module)
    assert [node.name for node in module.graph.nodes] == before
