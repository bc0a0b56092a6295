from __future__ import annotations

import json

import numpy as np
import onnx_ir as ir
import pytest

from deploykit.backends.openvino.passes import DIALECT
from deploykit.calibration.dialect import keep_float
from deploykit.calibration.float_fallback import keep_pointlike
from deploykit.calibration.plan import PLAN_FILE, SHIFT_FILE, QuantizationPlan, calibrate, plan_key
from deploykit.errors import CalibrationError
from deploykit.spec import Int8
from tests.calibration.networks import plan_of, rounding_noise_db, written


def test_a_plan_survives_being_saved_and_loaded(residual, tmp_path):
    residual.plan.save(tmp_path)
    loaded = QuantizationPlan.load(tmp_path)
    assert loaded.placement == residual.plan.placement
    assert loaded.ranges == residual.plan.ranges
    assert (loaded.key, loaded.images, loaded.calibrator) == ("0" * 64, 6, "mse")
    assert loaded.bias_shift.keys() == residual.plan.bias_shift.keys()
    one, other = (ir.to_proto(written(DIALECT, residual.graph, plan)) for plan in (residual.plan, loaded))
    assert one.SerializeToString(deterministic=True) == other.SerializeToString(deterministic=True)


def test_a_saved_plan_is_readable_and_says_why_nodes_stay_in_float(residual, tmp_path):
    keep_float(residual.graph.model, residual.plan, (keep_pointlike(),)).save(tmp_path)
    text = json.loads((tmp_path / PLAN_FILE).read_text())
    assert "1x1 map" in json.dumps(text["placement"]["float_nodes"])
    assert text["ranges"]["images"]["low"] < 0 < text["ranges"]["images"]["high"]


@pytest.mark.parametrize("file", [PLAN_FILE, SHIFT_FILE])
@pytest.mark.parametrize("content", [None, b"", b"{}", b"not a plan"], ids=["missing", "empty", "other", "nonsense"])
def test_a_damaged_plan_is_refused(residual, tmp_path, file, content):
    residual.plan.save(tmp_path)
    (tmp_path / file).unlink()
    if content is not None:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(CalibrationError, match="not readable"):
        QuantizationPlan.load(tmp_path)


def test_the_key_changes_with_each_of_its_parts():
    key = plan_key("weights", "images", Int8())
    assert key == plan_key("weights", "images", Int8())
    others = {
        plan_key("other", "images", Int8()),
        plan_key("weights", "other", Int8()),
        plan_key("weights", "images", Int8(calibrator="minmax")),
        plan_key("weights", "images", Int8(percentile=99.0)),
        plan_key("weights", "images", Int8(bias_correction=False)),
        plan_key("weights", "images", Int8(equalization=None)),
    }
    assert len(others) == 6
    assert key not in others


def test_ranges_are_those_of_the_tensors(residual):
    plan = plan_of(residual.graph, residual.images, Int8(calibrator="minmax", bias_correction=False))
    assert not plan.bias_shift
    stage1 = residual.run()[0]
    found = plan.range_of("stage1")
    assert found.low == 0
    assert found.high == pytest.approx(stage1.max(), rel=1e-5)
    assert plan.range_of("images").low == pytest.approx(residual.images.min())


def test_calibrating_twice_gives_the_same_plan(residual):
    again = plan_of(residual.graph, residual.images)
    assert again.ranges == residual.plan.ranges
    for name, shift in residual.plan.bias_shift.items():
        np.testing.assert_array_equal(again.bias_shift[name], shift)


def test_progress_counts_images(residual):
    heard = []
    batches = [image[None] for image in residual.images]
    calibrate(residual.graph.model, batches, Int8(), key="", on_batch=lambda found: heard.append(found.images))
    assert heard == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_correcting_biases_improves_real_weights(lite0):
    plain = plan_of(lite0.graph, lite0.images, Int8(bias_correction=False))
    expected = lite0.run()
    with_shift, without = (
        rounding_noise_db(expected, lite0.run(written(DIALECT, lite0.graph, plan))) for plan in (lite0.plan, plain)
    )
    assert with_shift[-1] > without[-1] + 0.3
    assert np.mean(with_shift) > np.mean(without) + 0.3


def test_no_images_and_nothing_to_quantize_are_errors(residual):
    with pytest.raises(CalibrationError, match="gave no images"):
        calibrate(residual.graph.model, [], Int8(), key="")
    images = ir.Value(name="images", shape=ir.Shape([1, 3, 8, 8]), type=ir.TensorType(ir.DataType.FLOAT))
    relu = ir.node("Relu", [images])
    graph = ir.Graph([images], relu.outputs, nodes=[relu], opset_imports={"": 21}, name="relu")
    with pytest.raises(CalibrationError, match="no convolution or matrix product"):
        calibrate(ir.Model(graph, ir_version=10), [], Int8(), key="")


def test_activations_that_overflow_are_refused(residual):
    with np.errstate(all="ignore"), pytest.raises(CalibrationError, match="NaN or infinite"):
        calibrate(residual.graph.model, [np.full((1, 3, 64, 64), 3e38, np.float32)], Int8(), key="")
