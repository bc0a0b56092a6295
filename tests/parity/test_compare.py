from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploykit.errors import ParityError, SpecError
from deploykit.parity.compare import ParityAccumulator, compare
from deploykit.parity.metrics import sqnr_db, top1_agreement
from deploykit.parity.report import MAX_SQNR_DB


def outputs(count: int = 4, seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    shapes = {"stage1": (8, 6, 6), "stage2": (16, 3, 3), "logits": (10,)}
    return {name: random.standard_normal((count, *shape)).astype(np.float32) for name, shape in shapes.items()}


def with_noise(clean: dict[str, np.ndarray], scale: float, seed: int = 1) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {name: (x + scale * random.standard_normal(x.shape)).astype(np.float32) for name, x in clean.items()}


def test_every_level_is_measured_in_the_references_order():
    reference, candidate = outputs(), with_noise(outputs(), 0.01)
    levels = compare(reference, dict(reversed(candidate.items())), min_sqnr_db=35, measured_on="onnxruntime")
    assert [level.name for level in levels] == ["stage1", "stage2", "logits"]
    for level in levels:
        assert level.sqnr_db == pytest.approx(sqnr_db(reference[level.name], candidate[level.name]))
        assert level.sqnr_db == pytest.approx(40, abs=2)
        assert level.passed
        assert level.measured_on == "onnxruntime"
    assert [level.top1_agreement for level in levels[:2]] == [None, None]
    assert levels[2].top1_agreement == top1_agreement(reference["logits"], candidate["logits"])


def test_one_bad_level_fails_alone():
    candidate = outputs()
    candidate["stage2"] = candidate["stage2"] * 1.5
    levels = compare(outputs(), candidate, min_sqnr_db=30)
    assert {level.name: level.passed for level in levels} == {"stage1": True, "stage2": False, "logits": True}
    assert levels[1].cosine == pytest.approx(1), "a cosine of one is no proof"


def test_one_nan_fails_its_level_whatever_the_budget():
    candidate = outputs()
    candidate["stage1"][2, 3, 4, 5] = math.nan
    candidate["logits"][1, 2] = math.inf
    levels = compare(outputs(), candidate, min_sqnr_db=-1e9)
    assert [level.passed for level in levels] == [False, True, False]
    assert levels[0].sqnr_db == -MAX_SQNR_DB
    assert levels[2].top1_agreement == 0.75
    assert all(math.isfinite(each) for level in levels for each in (level.max_abs, level.relative_l2, level.cosine))


def test_equal_outputs_are_capped_at_a_number_that_json_has():
    levels = compare(outputs(), outputs(), min_sqnr_db=80, min_top1_agreement=1.0)
    assert {level.sqnr_db for level in levels} == {MAX_SQNR_DB}
    assert all(level.passed for level in levels)


def test_the_top1_gate_fails_the_logits():
    candidate = outputs()
    candidate["logits"][0] = np.roll(candidate["logits"][0], 1)
    for gate, expected in ((0.8, False), (0.75, True), (None, True)):
        levels = compare(outputs(), candidate, min_sqnr_db=-100, min_top1_agreement=gate)
        assert [level.passed for level in levels] == [True, True, expected]


def test_levels_missing_on_either_side_are_named():
    reference, candidate = outputs(), outputs()
    del candidate["stage2"]
    candidate["stage9"] = candidate["stage1"]
    with pytest.raises(ParityError, match=r"engine lacks stage2.*reference lacks stage9"):
        compare(reference, candidate, min_sqnr_db=30)
    with pytest.raises(ParityError, match="no outputs"):
        compare({}, {}, min_sqnr_db=30)


def test_no_images_is_an_error_and_not_a_pass():
    with pytest.raises(ParityError, match="no images"):
        compare(outputs(0), outputs(0), min_sqnr_db=30)
    with pytest.raises(ParityError, match="no images"):
        ParityAccumulator().result(min_sqnr_db=30)


def test_wrong_shapes_and_a_broken_reference_name_the_level():
    candidate = outputs()
    candidate["stage2"] = candidate["stage2"].transpose(0, 2, 3, 1)
    with pytest.raises(ParityError, match=r"'stage2'.*\(4, 3, 3, 16\).*\(4, 16, 3, 3\)"):
        compare(outputs(), candidate, min_sqnr_db=30)
    reference = outputs()
    reference["stage1"][0, 0, 0, 0] = math.nan
    with pytest.raises(ParityError, match=r"'stage1'.*reference holds NaN"):
        compare(reference, outputs(), min_sqnr_db=30)
    uneven = outputs() | {"stage1": outputs(3)["stage1"]}
    with pytest.raises(ParityError, match="numbers of images"):
        compare(uneven, uneven, min_sqnr_db=30)
    scalar = {"stage1": np.float32(1.0).reshape(())}
    with pytest.raises(ParityError, match="numbers of images"):
        compare(scalar, scalar, min_sqnr_db=30)


def test_budgets_that_cannot_be_applied_are_refused():
    features = {"stage1": outputs()["stage1"]}
    with pytest.raises(SpecError, match="needs 'logits'"):
        compare(features, features, min_sqnr_db=30, min_top1_agreement=0.9)
    with pytest.raises(SpecError, match="from 0 to 1"):
        compare(outputs(), outputs(), min_sqnr_db=30, min_top1_agreement=95)
    with pytest.raises(SpecError, match="finite"):
        compare(outputs(), outputs(), min_sqnr_db=math.nan)


def test_a_batch_that_is_refused_leaves_the_sums_as_they_were():
    accumulator = ParityAccumulator()
    accumulator.update(outputs(), with_noise(outputs(), 0.1))
    before = accumulator.result(min_sqnr_db=10)
    bad = with_noise(outputs(), 5.0)
    bad["logits"] = bad["logits"][:, :5]
    with pytest.raises(ParityError, match="'logits'"):
        accumulator.update(outputs(), bad)
    with pytest.raises(ParityError, match="earlier ones"):
        accumulator.update({"stage1": bad["stage1"]}, {"stage1": bad["stage1"]})
    assert accumulator.result(min_sqnr_db=10) == before
    assert accumulator.images == 4


@given(st.lists(st.integers(0, 7), max_size=3), st.integers(0, 1000))
@settings(deadline=None)
def test_batches_add_up_to_the_whole(cuts, seed):
    reference = outputs(7, seed)
    candidate = with_noise(reference, 0.3, seed)
    accumulator = ParityAccumulator()
    edges = [0, *sorted(cuts), 7]
    for start, end in itertools.pairwise(edges):
        accumulator.update(*({name: x[start:end] for name, x in side.items()} for side in (reference, candidate)))
    assert accumulator.images == 7
    apart = accumulator.result(min_sqnr_db=10)
    whole = compare(reference, candidate, min_sqnr_db=10)
    for one, other in zip(apart, whole, strict=True):
        assert one.sqnr_db == pytest.approx(other.sqnr_db, abs=1e-9)
        assert one.cosine == pytest.approx(other.cosine)
        assert (one.max_abs, one.top1_agreement, one.passed) == (other.max_abs, other.top1_agreement, other.passed)
