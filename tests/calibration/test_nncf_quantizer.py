"""NNCF behind the plan: its integers, its ranges, its bias correction, and its own graph's numbers."""

from __future__ import annotations

import sys
from typing import get_args

import numpy as np
import onnx_ir as ir
import pytest

from deploykit.backends.openvino.passes import DIALECT
from deploykit.calibration.images import CalibrationSet
from deploykit.calibration.nncf_quantizer import ESTIMATORS, run_nncf
from deploykit.calibration.plan import QuantizationPlan
from deploykit.calibration.precision import plan_precision
from deploykit.calibration.recipes import with_recipe
from deploykit.errors import CalibrationError, CalibrationWarning, MissingDependency, SpecError
from deploykit.export.graphs import output_specs
from deploykit.export.quantized_file import settle_opset
from deploykit.graph import OnnxGraph
from deploykit.onnx_session import onnx_session
from deploykit.onnx_values import array_of
from deploykit.parity.metrics import sqnr_db
from deploykit.spec import Calibrator, InputSpec, Int8
from tests.export.quantized_models import SIDE, images, network

pytestmark = pytest.mark.filterwarnings("ignore:only 8 different calibration images")
NNCF = with_recipe(Int8(recipe="nncf"), "of a user")


@pytest.fixture(scope="module")
def graph():
    """The mobile blocks of the import's tests, whose biases NNCF corrects."""
    model = settle_opset(ir.from_proto(network()))
    spec = InputSpec(batch=1, channels=3, height=SIDE, width=SIDE)
    return OnnxGraph(input=spec, outputs=output_specs(model), model=model)


@pytest.fixture(scope="module")
def calibration(graph):
    return CalibrationSet(spec=graph.input, arrays=images())


@pytest.fixture(scope="module")
def own(graph, calibration):
    """NNCF's own graph."""
    pytest.importorskip("nncf", reason="nncf is not installed")
    return ir.from_proto(run_nncf(graph.model, calibration, NNCF))


def planned(graph, calibration, settings=NNCF):
    return plan_precision(graph.model, settings, calibration=calibration, probe=images(1), weights_digest="w")


@pytest.fixture(scope="module")
def plan(graph, calibration, own):
    return planned(graph, calibration)


def outputs(model):
    session = onnx_session(model, optimize=False)
    return np.concatenate([session.run(["scores"], {"images": image[None]})[0] for image in images()])


def test_an_engine_has_the_numbers_of_nncfs_own_graph(graph, own, plan):
    assert plan.calibrator == "nncf"
    assert not plan.imported
    assert len(plan.placement.weights) == 7
    assert sqnr_db(outputs(own), outputs(DIALECT.render(graph, plan, images(1)).graph.model)) > 35


def test_integers_ranges_and_biases_are_nncfs(graph, own, plan):
    nodes = {node.name: node for node in own.graph}
    corrected = 0
    for name, use in plan.placement.weights.items():
        restore = nodes[name].inputs[1].producer()
        values = array_of(graph.model.graph.initializers[use.weight])
        integers, scales = plan.integers_of(name, values, use.axis)
        np.testing.assert_array_equal(integers, array_of(restore.inputs[0]))
        np.testing.assert_allclose(scales, array_of(restore.inputs[1]), rtol=1e-6)
        shift = array_of(nodes[name].inputs[2]) - array_of(graph.model.graph.initializers[use.bias])
        np.testing.assert_array_equal(plan.bias_shift.get(name, np.zeros_like(shift)), shift)
        corrected += bool(np.any(shift))
    assert corrected
    quantize = next(node for node in own.graph if node.op_type == "QuantizeLinear" and node.inputs[0].name == "images")
    scale, zero_point = plan.range_of("images").affine()
    shift = 128 if quantize.inputs[2].dtype == ir.DataType.INT8 else 0
    assert scale == pytest.approx(float(array_of(quantize.inputs[1])), rel=1e-6)
    assert zero_point == int(array_of(quantize.inputs[2])) + shift


def test_settings_go_to_nncf(graph, calibration, plan):
    plain = planned(graph, calibration, with_recipe(Int8(recipe="nncf", bias_correction=None), "of a user"))
    assert (bool(plan.bias_shift), plain.bias_shift) == (True, {})
    coarse = planned(graph, calibration, with_recipe(Int8(recipe="nncf", reduce_range=True), "of a user"))
    values = array_of(graph.model.graph.initializers["stem.weight"])
    stem = next(name for name, use in plan.placement.weights.items() if use.weight == "stem.weight")
    reach = [int(np.abs(each.integers_of(stem, values, 0)[0]).max()) for each in (plan, coarse)]
    assert reach[0] > 100
    assert reach[1] <= 64
    assert coarse.reduce_range
    assert len({each.key for each in (plan, plain, coarse)}) == 3


def settings_of(**given):
    return with_recipe(Int8(recipe="nncf", **given), "of a user")


def input_range(quantized):
    """The range of the images in NNCF's own graph."""
    quantize = next(
        each for each in quantized.graph if each.op_type == "QuantizeLinear" and each.inputs[0].name == "images"
    )
    scale, zero_point = (array_of(value) for value in quantize.inputs[1:])
    low = int(np.iinfo(zero_point.dtype).min) - int(zero_point)
    return low * float(scale), (low + 255) * float(scale)


@pytest.mark.parametrize(
    ("calibrator", "low", "high"),
    [
        ("minmax", lambda each: each.min(), lambda each: each.max()),
        ("nncf", lambda each: np.mean([image.min() for image in each]), lambda each: np.mean([i.max() for i in each])),
        (
            "percentile",
            lambda each: np.mean([np.quantile(image, 0.02) for image in each]),
            lambda each: np.mean([np.quantile(image, 0.98) for image in each]),
        ),
        (
            "nncf-median",
            lambda each: np.median([image.min() for image in each]),
            lambda each: np.median([image.max() for image in each]),
        ),
    ],
)
def test_the_calibrator_chooses_nncfs_range_estimator(graph, calibration, own, calibrator, low, high):
    settings = settings_of(calibrator=calibrator, percentile=98)
    plan = planned(graph, calibration, settings)
    assert plan.calibrator == (calibrator if calibrator.startswith("nncf") else f"nncf-{calibrator}")
    found, step = plan.range_of("images"), plan.range_of("images").affine()[0]
    # NNCF moves both ends until the zero point is whole.
    assert found.low == pytest.approx(low(images()), abs=step)
    assert found.high == pytest.approx(high(images()), abs=step)
    theirs = input_range(ir.from_proto(run_nncf(graph.model, calibration, settings)))
    assert (found.low, found.high) == pytest.approx(theirs, rel=1e-5)


def test_every_estimator_of_nncf_can_be_chosen_and_gives_other_ranges(graph, calibration, own):
    plans = {name: planned(graph, calibration, settings_of(calibrator=name)) for name in ESTIMATORS}
    assert len({plan.key for plan in plans.values()}) == len(ESTIMATORS)
    ranges = {name: plan.range_of("images") for name, plan in plans.items()}
    assert len({(found.low, found.high) for found in ranges.values()}) == len(ESTIMATORS)
    assert ranges["nncf-mse"].high < ranges["nncf-minmax"].high


def test_an_estimator_that_nncf_lacks_is_named():
    with pytest.raises(SpecError, match=r"'entropy', and NNCF has no such range estimator.*mse, minmax, percentile"):
        settings_of(calibrator="entropy")
    assert set(ESTIMATORS) == {name for name in get_args(Calibrator) if name.startswith("nncf")}


def test_accuracy_control_keeps_the_layers_in_float_that_the_budget_needs(graph, calibration, own, plan):
    expected = outputs(graph.model)
    reached = sqnr_db(expected, outputs(own))
    settings = settings_of(mixed_precision=True, min_sqnr_db=reached + 3)
    controlled = planned(graph, calibration, settings)
    floats = controlled.placement.float_nodes
    assert 0 < len(floats) < len(plan.placement.weights)
    assert set(floats.values()) == {"NNCF leaves it in float"}
    assert sqnr_db(expected, outputs(ir.from_proto(run_nncf(graph.model, calibration, settings)))) >= reached + 3
    assert sqnr_db(expected, outputs(DIALECT.render(graph, controlled, images(1)).graph.model)) > reached + 2
    met = planned(graph, calibration, settings_of(mixed_precision=True, min_sqnr_db=reached - 1))
    assert met.placement.float_nodes == {}
    assert len({each.key for each in (plan, controlled, met)}) == 3


def test_a_budget_that_leaves_nothing_in_integers_is_left_to_the_search(graph, calibration, own, plan):
    with pytest.warns(CalibrationWarning, match="meets 99 dB with no layer in integers"):
        found = planned(graph, calibration, settings_of(mixed_precision=True, min_sqnr_db=99.0))
    assert found.placement == plan.placement
    assert found.ranges == plan.ranges


def test_a_plan_is_saved_and_loaded_with_nncfs_part(plan, tmp_path):
    plan.save(tmp_path)
    loaded = QuantizationPlan.load(tmp_path)
    assert loaded.ranges == plan.ranges
    np.testing.assert_equal(loaded.bias_shift, plan.bias_shift)


def test_settings_that_do_not_combine_are_named():
    with pytest.raises(SpecError, match=r"rounding is 'adaptive'.*expected 'nearest'"):
        with_recipe(Int8(recipe="nncf", rounding="adaptive"), "resnet")
    with pytest.raises(SpecError, match="weight_scales is 'mse'"):
        Int8(calibrator="nncf", weight_scales="mse")
    assert with_recipe(Int8(recipe="adaptive", calibrator="minmax"), "resnet").rounding == "adaptive"


def test_without_nncf_the_command_that_installs_it_is_told(graph, calibration, monkeypatch):
    monkeypatch.setitem(sys.modules, "nncf", None)
    with pytest.raises(MissingDependency, match="pip install nncf"):
        planned(graph, calibration)


def test_a_graph_that_nncf_fails_on_is_a_calibration_error(graph, calibration, own, monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("no such operator")

    monkeypatch.setattr("nncf.quantize", fail)
    with pytest.raises(CalibrationError, match=r"no such operator.*another recipe"):
        planned(graph, calibration)
