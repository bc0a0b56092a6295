"""Statistics in parts, counted in any order and anywhere, are those of one pass, bit by bit; and so is the plan."""

from __future__ import annotations

import numpy as np
import pytest

from deploykit.calibration.instrumented import Instrumented
from deploykit.calibration.partial import CountedImages, count_batch, measure_ends, merge, start_places
from deploykit.calibration.plan import calibrate
from deploykit.calibration.statistics import Statistics
from deploykit.errors import CalibrationError
from deploykit.spec import Int8, Preprocessing


@pytest.fixture(scope="module")
def batches(residual):
    generator = np.random.default_rng(0)
    shape = residual.images[:1].shape
    # Each batch is larger than those before, and the third is black: bins widen, and one tensor is all zeros.
    return [(2.0**k * generator.normal(size=shape) * (k != 2)).astype(np.float32) for k in range(6)]


@pytest.fixture(scope="module", params=["mse", "entropy"])
def settings(request):
    return Int8(calibrator=request.param).filled()


def parts_of(model, batches, settings, order):
    """The parts of all batches, counted in an order of their own and carried as bytes."""
    network = Instrumented(model, settings)
    places = list(start_places([measure_ends(network.observe(batch)[0]) for batch in batches]))
    counted = {n: count_batch(n, batches[n], *network.observe(batches[n]), places[n]).to_bytes() for n in order}
    return [CountedImages.from_bytes(counted[number]) for number in sorted(counted)]


def test_the_plan_of_merged_parts_is_that_of_one_pass_bit_by_bit(residual, batches, settings, tmp_path):
    model = residual.graph.model
    whole = Statistics(Preprocessing())
    plan = calibrate(model, batches, settings, key="k", started=whole)
    merged = merge(parts_of(model, batches, settings, [4, 1, 5, 0, 3, 2]), Statistics(Preprocessing()))
    for name, folder in (("whole", whole), ("merged", merged)):
        folder.save(tmp_path / f"{name}.npz")
    assert (tmp_path / "whole.npz").read_bytes() == (tmp_path / "merged.npz").read_bytes()
    other = calibrate(model, (), settings, key="k", started=merged)
    for name, each in (("one", plan), ("two", other)):
        (tmp_path / name).mkdir()
        each.save(tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_a_part_that_is_missing_or_twice_is_refused(residual, batches, settings):
    parts = parts_of(residual.graph.model, batches[:3], settings, range(3))
    with pytest.raises(CalibrationError, match="part of batch 2 follows 1 batches"):
        merge([parts[0], parts[2]], Statistics())
    with pytest.raises(CalibrationError, match="part of batch 0 follows 1 batches"):
        merge([parts[0], parts[0]], Statistics())
    with pytest.raises(CalibrationError, match="cannot be read"):
        CountedImages.from_bytes(b"no part")


def test_nan_is_refused_where_it_is_measured():
    with pytest.raises(CalibrationError, match="NaN or infinite"):
        measure_ends({"x": np.array([np.nan], np.float32)})
