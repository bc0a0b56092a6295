"""Gates in the integers of a torch program: products of int8, and convolutions that round to the gate itself."""

from __future__ import annotations

import numpy as np
import torch
from torch.fx import GraphModule, Node

from deploykit.calibration.integer_maps import write_integer_maps
from deploykit.calibration.torch_gates import write_integer_gates
from deploykit.calibration.torch_integers import copy_of, value_of
from tests.calibration.conftest import Case
from tests.calibration.networks import Gated

ATEN, DECOMPOSED = torch.ops.aten, torch.ops.quantized_decomposed


def _written(case: Case, *, gates: bool) -> GraphModule:
    module = copy_of(case.program.program)
    write_integer_maps(module, case.plan, Gated.outputs)
    if gates:
        write_integer_gates(module)
    module.graph.lint()
    module.recompile()
    return module


def _calls(module: GraphModule, target: object) -> list[Node]:
    return module.graph.find_nodes(op="call_function", target=target)


def test_every_gated_map_is_a_product_of_integers(gated: Case):
    module = _written(gated, gates=True)
    restore = DECOMPOSED.dequantize_per_tensor.default
    products = _calls(module, ATEN.mul.Tensor)
    assert len(products) == 3
    restored = [factor for product in products for factor in product.args]
    assert all(factor.target == restore and len(factor.users) == 1 for factor in restored)
    assert not _calls(module, ATEN.silu.default)


def test_a_sigmoid_that_gates_nothing_stays(gated: Case):
    sigmoids = _calls(_written(gated, gates=True), ATEN.sigmoid.default)
    readers = [{user.target for user in node.users} for node in sigmoids]
    quantized = {DECOMPOSED.quantize_per_tensor.default}
    assert sorted(reader == quantized for reader in readers) == [False, True, True]


def test_a_hard_sigmoid_goes_into_the_scales_of_its_convolution(gated: Case):
    before, after = (_written(gated, gates=gates) for gates in (False, True))
    assert [len(_calls(module, ATEN.hardsigmoid.default)) for module in (before, after)] == [1, 0]
    weights = [_calls(module, DECOMPOSED.dequantize_per_channel.default)[-2] for module in (before, after)]
    (old, old_scales), (new, new_scales) = (
        (value_of(module, weight.args[0]), value_of(module, weight.args[1]))
        for module, weight in zip((before, after), weights, strict=True)
    )
    assert torch.equal(old, new)
    torch.testing.assert_close(new_scales, old_scales / 6)


def test_the_gates_keep_the_numbers_to_a_step_of_them(gated: Case):
    before, after = (_written(gated, gates=gates) for gates in (False, True))
    image = torch.from_numpy(gated.images[:1])
    with torch.no_grad():
        for one, other in zip(before(image), after(image), strict=True):
            noise = np.square((one - other).numpy()).sum()
            assert 10 * np.log10(np.square(one.numpy()).sum() / max(noise, 1e-30)) > 35
