"""Norms between integers: a depthwise convolution with the factor of each channel to the bit; others stay."""

from __future__ import annotations

import pytest
import torch
from torch.fx import GraphModule, Node

from deploykit.backends.litert.integer_norms import write_integer_norms
from deploykit.calibration.integer_maps import write_integer_maps
from deploykit.calibration.torch_integers import copy_of, value_of
from tests.calibration.conftest import Case
from tests.calibration.networks import Gated
from tests.conftest_graphs import sqnr_db

ATEN = torch.ops.aten


@pytest.fixture
def module(gated: Case) -> GraphModule:
    """The network with its plan."""
    module = copy_of(gated.program.program)
    write_integer_maps(module, gated.plan, Gated.outputs)
    module.recompile()
    return module


def _norm(module: GraphModule) -> Node:
    (norm,) = module.graph.find_nodes(op="call_function", target=ATEN.batch_norm.default)
    return norm


def test_the_weights_are_the_factors(module: GraphModule):
    gain, _, _, variance = (value_of(module, node).double() for node in _norm(module).args[1:5])
    write_integer_norms(module)
    module.graph.lint()
    (layer,) = [n for n in module.graph.nodes if n.target == ATEN.conv2d.default and n.args[-1] == 48]
    integers, scales = (value_of(module, node) for node in layer.args[1].args[:2])
    assert integers.dtype == torch.int8 and integers.shape == (48, 1, 1, 1)
    assert set(integers.unique().tolist()) <= {-127, 127}
    factor = gain / (variance + _eps()).sqrt()
    torch.testing.assert_close((integers.flatten() * scales).double(), factor, rtol=1e-6, atol=0)


def test_the_bias_of_a_dead_channel_fits_into_32_bits(module: GraphModule):
    gain = value_of(module, _norm(module).args[1])
    gain[0] = 0
    gain[1] *= 1e-9
    write_integer_norms(module)
    (layer,) = [n for n in module.graph.nodes if n.target == ATEN.conv2d.default and n.args[-1] == 48]
    scales, shift = value_of(module, layer.args[1].args[1]), value_of(module, layer.args[2])
    assert float((shift.abs() / (layer.args[0].args[1] * scales)).max()) < 2**31


def _eps() -> float:
    return torch.nn.BatchNorm2d(1).eps


def test_the_numbers_stay(module: GraphModule, gated: Case):
    image = torch.from_numpy(gated.images[:1])
    with torch.no_grad():
        before = module(image)
        write_integer_norms(module)
        module.recompile()
        after = module(image)
    assert not module.graph.find_nodes(op="call_function", target=ATEN.batch_norm.default)
    assert all(sqnr_db(one.numpy(), other.numpy()) > 35 for one, other in zip(before, after, strict=True))


def test_a_norm_that_something_reads_in_float_stays(module: GraphModule):
    norm = _norm(module)
    (relu,) = norm.users
    with module.graph.inserting_after(relu):
        twin = module.graph.call_function(ATEN.neg.default, (relu,))
    module.graph.output_node().args = ((*module.graph.output_node().args[0], twin),)
    write_integer_norms(module)
    assert _norm(module) is norm
