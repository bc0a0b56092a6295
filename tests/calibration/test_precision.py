from __future__ import annotations

import pytest

from deploykit.calibration.half import HalfPlan
from deploykit.calibration.images import CalibrationSet
from deploykit.calibration.plan import QuantizationPlan, plan_key
from deploykit.calibration.precision import Bf16Plan, plan_precision
from deploykit.errors import CalibrationError
from deploykit.spec import Bf16, Fp16, Fp32, Int8


@pytest.mark.parametrize(
    ("precision", "kind"), [(Fp32(), type(None)), (Fp16(), HalfPlan), (Bf16(), Bf16Plan), (Int8(), QuantizationPlan)]
)
def test_each_precision_has_its_plan(residual, precision, kind):
    calibration = CalibrationSet(spec=residual.graph.input, arrays=residual.images)
    plan = plan_precision(
        residual.graph.model, precision, calibration=calibration, probe=residual.images, weights_digest="w"
    )
    assert type(plan) is kind
    if isinstance(plan, QuantizationPlan):
        assert plan.key == plan_key("w", calibration.digest, precision)
        assert plan.images == len(calibration)


def test_int8_without_images_is_an_error_that_says_what_to_pass(residual):
    with pytest.raises(CalibrationError, match=r"calibration=FOLDER.*Random data is never used"):
        plan_precision(residual.graph.model, Int8(), calibration=None, probe=residual.images, weights_digest="w")
