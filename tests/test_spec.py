from __future__ import annotations

import math

import msgspec
import pytest

from deploykit.errors import SpecError
from deploykit.precisions import PRECISIONS, parse_precision
from deploykit.spec import BatchRange, InputSpec, Int8, Preprocessing, SizeRange

SPEC = InputSpec(batch=2, height=32, width=48, preprocessing=Preprocessing(crop_mode="squash"))


def test_the_shape_follows_the_layout():
    assert SPEC.shape == (2, 3, 32, 48)
    assert SPEC.as_pixels().shape == (2, 32, 48, 3)
    assert InputSpec(batch=BatchRange()).as_pixels().shape == ("batch", 224, 224, 3)


def test_pixels_and_images_are_two_forms_of_one_input():
    pixels = SPEC.as_pixels()
    assert (pixels.dtype, pixels.layout, pixels.embeds_preprocessing) == ("uint8", "NHWC", True)
    assert not SPEC.embeds_preprocessing
    assert pixels.as_images() == SPEC
    assert pixels.as_pixels() == pixels


def test_both_forms_survive_json():
    for spec in (SPEC, SPEC.as_pixels()):
        assert msgspec.json.decode(msgspec.json.encode(spec), type=InputSpec) == spec


@pytest.mark.parametrize("pair", [("uint8", "NCHW"), ("float32", "NHWC"), ("float16", "NCHW")], ids=str)
def test_no_other_pair_of_dtype_and_layout_is_an_input(pair):
    dtype, layout = pair
    with pytest.raises(SpecError, match=r"expected float32 NCHW or uint8 NHWC"):
        InputSpec(dtype=dtype, layout=layout)
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"dtype": dtype, "layout": layout}, InputSpec)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("rounding", "adaptiv", "Did you mean 'adaptive'"),
        ("weight_scales", "mean", "weight_scales is 'mean'"),
        ("bias_correction", "slow", r"bias_correction is .slow.\. Known: fast, full"),
        ("recipe_budget_s", 0, "must be above 0 seconds"),
        ("recipe_budget_s", float("nan"), "must be above 0 seconds"),
    ],
)
def test_a_wrong_setting_of_int8_is_told_with_what_is_expected(field, value, message):
    with pytest.raises(SpecError, match=message):
        Int8(**{field: value})


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_sqnr_db": math.nan}, "min_sqnr_db is nan; it must be a finite number of dB"),
        ({"min_sqnr_db": -math.inf}, "min_sqnr_db is -inf"),
        ({"min_top1_agreement": 1.5}, r"min_top1_agreement is 1\.5; it must be from 0 to 1"),
        ({"min_top1_agreement": math.nan}, "min_top1_agreement is nan"),
    ],
    ids=str,
)
def test_a_budget_that_is_none_is_refused_at_the_door(precision, settings, message):
    with pytest.raises(SpecError, match=message):
        parse_precision(precision, settings)


@pytest.mark.parametrize("field", ["mean", "std"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_mean_and_std_are_finite(field, value):
    with pytest.raises(SpecError, match=f"{field} is .* every value must be a finite number"):
        Preprocessing(**{field: (0.5, value, 0.5)})


@pytest.mark.parametrize(
    "sizes",
    [
        {"batch": 10**20},
        {"batch": BatchRange(max=10**12)},
        {"height": 10**20},
        {"height": 64, "width": 64, "sizes": SizeRange(min=32, opt=64, max=10**10)},
        {"channels": 10**12},
    ],
    ids=str,
)
def test_images_that_no_machine_holds_are_refused(sizes):
    with pytest.raises(SpecError, match="which no machine holds"):
        InputSpec(**sizes)


def test_bias_correction_may_be_switched_on_and_off():
    assert Int8(bias_correction=True) == Int8(bias_correction="fast")
    assert Int8(bias_correction=False) == Int8(bias_correction=None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_metric_drop": -0.1}, r"max_metric_drop is -0\.1; it must be 0 or more"),
        ({"max_metric_drop": float("nan")}, "max_metric_drop is nan; it must be 0 or more"),
        ({"percentile": 50.0}, r"percentile is 50\.0; it must be above 50 and at most 100"),
        ({"percentile": 100.1}, r"percentile is 100\.1; it must be above 50 and at most 100"),
        ({"equalization": 1.5}, r"equalization is 1\.5; it must be 0 to 1, or None for none"),
        ({"recipe_budget_s": 0.0}, r"recipe_budget_s is 0\.0; it must be above 0 seconds"),
    ],
    ids=str,
)
def test_a_number_outside_its_range_is_named(settings, message):
    with pytest.raises(SpecError, match=message):
        Int8(**settings)


def test_a_precision_of_another_kind_is_refused():
    with pytest.raises(SpecError, match=r"precision is 8; give one of fp32, fp16, bf16, int8, or its dataclass"):
        parse_precision(8)
