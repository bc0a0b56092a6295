from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from deploykit.calibration.plan import PLAN_FILE, SHIFT_FILE, QuantizationPlan
from deploykit.calibration.plan_cache import PlanCache, PlanKey
from deploykit.errors import CalibrationError
from deploykit.store import Store


@pytest.fixture
def make(residual):
    def counted():
        counted.calls += 1
        return residual.plan

    counted.calls, counted.plan = 0, residual.plan
    return counted


@pytest.fixture
def key(residual) -> PlanKey:
    return PlanKey.of(residual.plan.key, residual.graph.model)


def same(one: QuantizationPlan, other: QuantizationPlan) -> bool:
    return one.ranges == other.ranges and all(
        np.array_equal(shift, other.bias_shift[node]) for node, shift in one.bias_shift.items()
    )


def test_a_plan_is_made_once_and_comes_back_whole(tmp_path, make, key):
    first = PlanCache(Store(tmp_path)).get_or_make(key, make)
    again = PlanCache(Store(tmp_path)).get_or_make(key, make)
    assert make.calls == 1
    assert same(first, again)
    other = PlanKey(plan=make.plan.key, graph="another graph")
    assert PlanCache(Store(tmp_path)).get_or_make(other, make) is make.plan
    assert make.calls == 2


def test_one_flipped_bit_anywhere_makes_the_plan_again(tmp_path, make, key, caplog):
    cache = PlanCache(Store(tmp_path))
    cache.get_or_make(key, make)
    for name in (PLAN_FILE, SHIFT_FILE):
        (path,) = tmp_path.rglob(name)
        size = path.stat().st_size
        for position in range(0, size, max(1, size // 30)):
            calls, content = make.calls, bytearray(path.read_bytes())
            content[position] ^= 1 << position % 8
            path.write_bytes(content)
            with caplog.at_level(logging.WARNING, logger="deploykit"):
                assert cache.get_or_make(key, make) is make.plan
            assert make.calls == calls + 1, (name, position)
    assert "is not used and made again" in caplog.text
    assert same(cache.get_or_make(key, make), make.plan)


@pytest.mark.parametrize("name", [PLAN_FILE, SHIFT_FILE])
def test_one_flipped_bit_in_a_saved_plan_is_refused(tmp_path, residual, name):
    """A plan proves itself, wherever it is kept."""
    residual.plan.save(tmp_path)
    assert same(QuantizationPlan.load(tmp_path), residual.plan)
    good = (tmp_path / name).read_bytes()
    for position in range(0, len(good), max(1, len(good) // 300)):
        bad = bytearray(good)
        bad[position] ^= 1 << position % 8
        (tmp_path / name).write_bytes(bad)
        with pytest.raises(CalibrationError):
            QuantizationPlan.load(tmp_path)


def test_a_plan_of_version_0_1_0_is_read():
    bundles = Path(__file__).parents[1] / "data" / "bundles-0.1.0"
    assert QuantizationPlan.load(bundles / "onnxruntime-int8").ranges


def test_a_swapped_plan_is_not_used(tmp_path, make, key):
    cache = PlanCache(Store(tmp_path))
    cache.get_or_make(key, make)
    other = PlanKey(plan="another", graph=key.graph)
    (tmp_path / "plans" / key.address("plans").key).rename(tmp_path / "plans" / other.address("plans").key)
    cache.get_or_make(other, make)
    assert make.calls == 2


def test_a_failure_leaves_no_plan_and_no_lock(tmp_path, make, key):
    def fail():
        raise CalibrationError("no images")

    cache = PlanCache(Store(tmp_path))
    with pytest.raises(CalibrationError, match="no images"):
        cache.get_or_make(key, fail)
    assert cache.get_or_make(key, make) is make.plan


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path, make, key, caplog):
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING, logger="deploykit"):
        assert PlanCache(Store(tmp_path / "file")).get_or_make(key, make) is make.plan
    assert "cannot be used" in caplog.text
