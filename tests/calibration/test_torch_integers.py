"""The plan's integers in torch programs: types, names and constants that dialects share."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from deploykit.calibration.ranges import ActivationRange
from deploykit.calibration.torch_integers import Integers, copy_of, planned_nodes, value_of, write_weight


@pytest.mark.parametrize(("dtype", "zero_point", "least"), [(torch.uint8, 51, 0), (torch.int8, -77, -128)])
def test_both_types_have_the_same_steps(dtype, zero_point, least):
    measured = ActivationRange(low=-0.2, high=0.8, amax=0.8)
    scale, zero, low, high, kind = Integers(dtype=dtype).settings(measured)
    assert (zero, low, high, kind) == (zero_point, least, least + 255, dtype)
    assert scale == pytest.approx(1 / 255)


@pytest.mark.parametrize("name", ["residual", "tokens"])
def test_every_planned_weight_is_found_and_written(name, request):
    case = request.getfixturevalue(name)
    module = copy_of(case.program.program)
    planned = list(planned_nodes(module, case.plan))
    assert {each.name for each in planned} <= set(case.plan.placement.weights)
    assert {each.use.weight for each in planned} == {use.weight for use in case.plan.placement.weights.values()}
    each = planned[-1]
    before = value_of(module, each.node.args[1])
    write_weight(module, each, case.plan)
    restored = each.node.args[1]
    integers, scales = (value_of(module, argument).numpy() for argument in restored.args[:2])
    assert integers.dtype == np.int8
    np.testing.assert_allclose(integers * scales[:, None], before.numpy(), atol=scales.max() / 2 * 1.001)
