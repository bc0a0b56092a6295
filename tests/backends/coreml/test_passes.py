"""Core ML's INT8: every planned layer in the plan's integers, between rounded tensors; read from the package."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch

from deploykit.backends.coreml.inspect import left_in_float
from deploykit.backends.coreml.integer_weights import Layer, check_integers, integer_layers, planned_layers
from deploykit.backends.coreml.mil_program import read_program
from deploykit.backends.coreml.passes import DIALECT
from deploykit.calibration.half import HalfPlan
from deploykit.errors import ExportError
from deploykit.onnx_values import array_of
from tests.backends.coreml.conftest import Package, package_of
from tests.calibration.conftest import Case
from tests.conftest_graphs import lower

_DQ = torch.ops.quantized_decomposed.dequantize_per_tensor.default


@pytest.fixture(
    scope="module",
    params=[
        ("residual", False),
        pytest.param(("residual", True), marks=pytest.mark.slow),
        pytest.param(("tokens", False), marks=pytest.mark.slow),
        pytest.param(("tokens", True), marks=pytest.mark.slow),
        pytest.param(("windows", False), marks=pytest.mark.slow),
    ],
    ids=lambda chosen: f"{chosen[0]}-{'fp16' if chosen[1] else 'fp32'}",
)
def package(request, tmp_path_factory) -> Package:
    if request.param == ("residual", False):
        made: Package = request.getfixturevalue("residual_package")
        return made
    name, half = request.param
    return package_of(request.getfixturevalue(name), tmp_path_factory.mktemp("coreml"), half=half)


def test_every_planned_layer_reads_rounded_values_and_none_is_left_in_float(package: Package):
    found = left_in_float(package.folder / package.manifest.engine)
    assert set(found) == {"quantize", "dequantize"}
    assert len(integer_layers(read_program(package.path))) == len(package.case.plan.placement.weights)


def test_the_integers_in_the_package_are_the_plans(package: Package):
    plan, weights = package.case.plan, package.case.graph.model.graph.initializers
    stored = {(layer.integers, layer.scales) for layer in integer_layers(read_program(package.path))}
    for name, use in plan.placement.weights.items():
        integers, scales = plan.integers_of(name, array_of(weights[use.weight]), use.axis)
        if use.axis == 1:
            integers = np.ascontiguousarray(integers.T)
        kept = scales.astype(np.float16 if package.half else np.float32)
        assert (integers.tobytes(), kept.tobytes()) in stored, name


def test_what_layers_read_is_rounded_in_the_plans_ranges(package: Package):
    plan = package.case.plan
    stored = {(layer.scale, layer.zero_point) for layer in integer_layers(read_program(package.path))}
    for name, use in plan.placement.weights.items():
        scale, zero_point = plan.range_of(use.input).affine()
        kept = np.asarray(scale, np.float16 if package.half else np.float32)
        assert (kept.tobytes(), zero_point - 128) in stored, name


def test_layers_with_other_integers_or_ranges_are_named(package: Package):
    program = read_program(package.path)
    layer = integer_layers(program)[0]
    check_integers(program, [layer])
    for change in (
        {"integers": bytes(len(layer.integers))},
        {"scales": layer.scales[::-1]},
        {"zero_point": layer.zero_point + 1},
    ):
        with pytest.raises(ExportError, match=r"changed the integers of conv2d_1: .*another runtime"):
            check_integers(program, [dataclasses.replace(layer, name="conv2d_1", **change)])


def test_a_layer_that_reads_floats_is_named(residual: Case):
    module = DIALECT.render(residual.program, residual.plan, residual.images).graph.program.module()
    assert all(isinstance(layer, Layer) for layer in planned_layers(module, half=False))
    restored = next(node for node in module.graph.nodes if node.target == _DQ)
    (layer,) = restored.users
    layer.replace_input_with(restored, restored.args[0].args[0])
    with pytest.raises(ExportError, match=rf"{layer.name} reads images in float"):
        planned_layers(module, half=False)


def test_linears_that_share_a_weight_read_in_their_own_ranges(tokens: Case):
    module = DIALECT.render(tokens.program, tokens.plan, tokens.images).graph.program.module()
    found = Counter((layer.scale, layer.zero_point) for layer in planned_layers(module, half=False))
    expected = Counter()
    for use in tokens.plan.placement.weights.values():
        scale, zero_point = tokens.plan.range_of(use.input).affine()
        expected[np.float32(scale).tobytes(), zero_point - 128] += 1
    assert found == expected


def test_a_shared_weight_that_a_plan_has_only_once_is_refused(tokens: Case):
    weights = dict(tokens.plan.placement.weights)
    counted = Counter(use.weight for use in weights.values())
    once = next(name for name, use in weights.items() if counted[use.weight] > 1)
    del weights[once]
    plan = dataclasses.replace(tokens.plan, placement=dataclasses.replace(tokens.plan.placement, weights=weights))
    module = DIALECT.render(tokens.program, plan, tokens.images).graph.program.module()
    with pytest.raises(ExportError, match="in float, and the plan has no range of it"):
        planned_layers(module, half=False)


def test_half_precision_is_left_to_the_converter_but_for_what_a_plan_keeps(residual: Case):
    rendered = DIALECT.render(residual.program, HalfPlan(float_weights={"stem.0.weight": 40.0}), residual.images).graph
    assert rendered.half_except == ("stem.0.weight",)
    assert rendered.program is residual.program.program
    assert DIALECT.render(residual.program, None, residual.images).graph.half_except is None


@pytest.mark.slow
def test_the_weights_that_a_plan_keeps_stay_in_float32(residual: Case, tmp_path):
    kept = "stem.0.weight"
    graph = DIALECT.render(residual.program, HalfPlan(float_weights={kept: 40.0}), residual.images).graph
    lower("coreml", graph, tmp_path)
    program = read_program(tmp_path / "model.mlpackage")
    expected = residual.program.program.state_dict[kept].numpy()
    sizes = [len(weight.constants["val"]) for _, weight in program.weighted()]
    assert expected.nbytes in sizes
    assert [weight.constants["val"] for _, weight in program.weighted()].count(expected.tobytes()) == 1
    floats = {name: value for name, value in residual.program.program.state_dict.items() if value.ndim in (2, 4)}
    assert sum(sizes) == sum(value.numel() * (4 if name == kept else 2) for name, value in floats.items())
