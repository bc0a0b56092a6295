from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest

from deploykit.calibration.half import HalfPlan
from deploykit.calibration.images import CalibrationSet
from deploykit.calibration.plan import QuantizationPlan, calibrate, plan_key
from deploykit.calibration.plan_cache import PlanCache
from deploykit.calibration.precision import Tuning, plan_precision
from deploykit.calibration.precision_plan import Bf16Plan
from deploykit.calibration.recipes import RECIPES
from deploykit.calibration.statistics import Statistics
from deploykit.errors import CalibrationError, CalibrationWarning
from deploykit.spec import Bf16, Fp16, Fp32, Int8, Preprocessing
from deploykit.store import Store


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


def planned(case, precision=None, *, images=None, digest="w", **options):
    arrays = case.images if images is None else images
    calibration = CalibrationSet(spec=case.graph.input, arrays=arrays)
    return plan_precision(
        case.graph.model,
        precision or Int8(),
        calibration=calibration,
        probe=case.images,
        weights_digest=digest,
        **options,
    )


KEYS = {
    "fast": "78f4b44943f109b1",
    "adaptive": "55db519c6d42f135",
    "wide-adaptive": "e039fb8dbd451942",
    "activations-first": "9f23d4a929595ccb",
    "full": "dd41c3d2b794a64b",
    "clipped": "c4c4bbcde1b30a14",
    "wide": "1f2b599971cd7c64",
    "weights-first": "f67013bf98211913",
    "plain": "817e0dcb55e0282f",
}
"""How the keys of plans begin that are in users' caches."""


@pytest.mark.parametrize("recipe", KEYS)
def test_plans_that_ask_for_no_distillation_are_byte_for_byte_as_without_it(residual, recipe, tmp_path):
    settings = RECIPES[recipe].applied_to(Int8())
    assert plan_key("weights", "images", settings)[:16] == KEYS[recipe]

    def refuse(*given):
        raise AssertionError("the plan asks for no tuning")

    files = []
    for number, tune in enumerate((None, Tuning(run=refuse, runtime="openvino"))):
        folder = tmp_path / str(number)
        folder.mkdir()
        planned(residual, settings, tune=tune).save(folder)
        files.append([file.read_bytes() for file in sorted(folder.iterdir())])
    assert files[0] == files[1]


def test_distillation_without_a_network_in_torch_is_told(residual):
    with pytest.raises(CalibrationError, match="trains the network in torch, and only its ONNX graph was given"):
        planned(residual, Int8(rounding="distilled"))


def test_bad_images_are_warned_of_each_time_a_plan_of_them_is_used(residual, tmp_path):
    cache = PlanCache(Store(tmp_path))
    for _ in range(2):
        with pytest.warns(CalibrationWarning, match="only 6 different calibration images"):
            planned(residual, cache=cache)


def test_a_cached_plan_is_not_calibrated_again_and_other_settings_are(residual, tmp_path):
    cache, heard = PlanCache(Store(tmp_path)), []
    for precision in (Int8(), Int8(), Int8(min_sqnr_db=3), Int8(calibrator="entropy")):
        plan = planned(residual, precision, cache=cache, on_image=heard.append)
        assert plan.calibrator == precision.filled().calibrator
    assert heard == [1, 2, 3, 4, 5, 6] * 2


def test_another_float_type_beside_int8_is_not_calibrated_again(residual, tmp_path):
    cache, heard = PlanCache(Store(tmp_path / "store")), []
    single, half = (
        planned(residual, precision, cache=cache, on_image=heard.append)
        for precision in (Int8(), Int8(float_dtype="fp16"))
    )
    assert heard == [1, 2, 3, 4, 5, 6]
    assert (single.float_dtype, half.float_dtype) == ("fp32", "fp16")
    assert single.key != half.key
    assert half.ranges == single.ranges
    (tmp_path / "saved").mkdir()
    half.save(tmp_path / "saved")
    assert QuantizationPlan.load(tmp_path / "saved").float_dtype == "fp16"


def test_an_offered_plan_is_used_as_it_is(residual):
    made = planned(residual)
    assert planned(residual, offered=made) is made


def test_a_plan_of_other_weights_is_refused_with_both_digests(residual):
    made = planned(residual, digest="1" * 64)
    with pytest.raises(CalibrationError, match=f"digest {'1' * 64}.*digest {'2' * 64}. Calibrate again"):
        planned(residual, digest="2" * 64, offered=made)


def test_a_plan_of_a_graph_with_other_constants_is_refused(residual, tokens):
    with pytest.raises(CalibrationError, match="equalization are not"):
        planned(tokens, offered=planned(residual))


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_images(residual):
    generator = np.random.default_rng(0)

    def batches(count: int) -> Iterator[np.ndarray]:
        for number in range(count):
            if number % 16 == 0:
                gc.collect()  # of the graphs that were made before, whenever Python would do it
            yield generator.normal(size=(1, 3, 64, 64)).astype(np.float32)

    def peak(count: int) -> int:
        tracemalloc.start()
        started = Statistics(Preprocessing())
        calibrate(residual.graph.model, batches(count), Int8(calibrator="entropy"), key="", started=started)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(1)
    few, many = peak(64), peak(512)
    assert many < 1.1 * few
