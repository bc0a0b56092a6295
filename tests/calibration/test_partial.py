"""Statistics in parts, counted in any order and anywhere, are those of one pass, bit by bit; and so is the plan."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from deploykit.calibration.cluster_statistics import CountWorker, EndsWorker, count_on_cluster
from deploykit.calibration.images import CalibrationSet, calibration_set
from deploykit.calibration.instrumented import Instrumented
from deploykit.calibration.partial import CountedImages, count_batch, measure_ends, merge, start_places
from deploykit.calibration.plan import calibrate
from deploykit.calibration.statistics import Statistics
from deploykit.errors import CalibrationError, SpecError
from deploykit.spec import InputSpec, Int8, Preprocessing
from tests.calibration.networks import SIDE


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


def test_the_workers_of_a_cluster_count_what_one_pass_counts(residual, settings, tmp_path):
    """Each is made of what goes to its process as plain data, and gives plain bytes."""
    spec = InputSpec(height=SIDE, width=SIDE)
    model, images = residual.graph.model, CalibrationSet(spec=spec, arrays=residual.images)
    proto = ir.to_proto(model).SerializeToString()
    given = {"here": Path.cwd(), "model": proto, "images": images, "settings": settings, "size": 1}
    numbers = range(len(residual.images))
    ends = EndsWorker(**given)
    places = list(start_places(np.frombuffer(ends(number), np.float64).reshape(-1, 3) for number in numbers))
    count = CountWorker(places=places, **given)
    parts = [CountedImages.from_bytes(count(number)) for number in numbers]
    merged, whole = merge(parts, Statistics(Preprocessing())), Statistics(Preprocessing())
    calibrate(model, images.batches(1), settings, key="k", started=whole)
    for name, each in (("whole", whole), ("merged", merged)):
        each.save(tmp_path / f"{name}.npz")
    assert (tmp_path / "whole.npz").read_bytes() == (tmp_path / "merged.npz").read_bytes()


def test_a_batch_is_that_of_its_number_of_arrays_and_of_files(photographs):
    spec = InputSpec(height=32, width=32)
    files = calibration_set(photographs, spec)
    arrays = calibration_set(files.sample(len(files)), spec)
    for each in (files, arrays):
        for number, batch in enumerate(each.batches(4)):
            np.testing.assert_array_equal(each.batch_at(number, 4), batch)


def test_unreadable_images_cannot_be_left_out_on_a_cluster(residual):
    images = CalibrationSet(spec=InputSpec(height=SIDE, width=SIDE), arrays=residual.images, skip_corrupt=True)
    with pytest.raises(SpecError, match=r"each process has to know which images are in its batches\. Fix: take the"):
        count_on_cluster(residual.graph.model, images, Int8().filled(), lambda _: None)
