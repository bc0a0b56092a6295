from __future__ import annotations

import numpy as np
import pytest

from deploykit.calibration.plan import calibrate
from deploykit.calibration.statistics import Statistics
from deploykit.errors import CalibrationError
from deploykit.spec import Int8, Preprocessing
from tests.calibration.networks import plan_of


def batches(count: int, seed: int = 0) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.normal(scale=1 + number, size=(2, 3, 8, 8)).astype(np.float32) for number in range(count)]


def fed(statistics: Statistics, images: list[np.ndarray]) -> Statistics:
    for batch in images:
        statistics.update(batch, {"maps": batch, "positive": np.abs(batch)}, {"means": batch.mean((0, 2, 3))})
    return statistics


def test_statistics_that_were_saved_and_loaded_go_on_to_the_same_bits(tmp_path):
    images = batches(9)
    fed(Statistics(Preprocessing()), images[:4]).save(tmp_path / "state")
    resumed = fed(Statistics.load(tmp_path / "state", Preprocessing()), images[4:])
    whole = fed(Statistics(Preprocessing()), images)
    assert (resumed.images, resumed.batches) == (whole.images, whole.batches) == (18, 9)
    for name, histogram in whole.histograms.items():
        np.testing.assert_array_equal(resumed.histograms[name].state(), histogram.state())
        for calibrator in ("mse", "minmax", "percentile", "entropy"):
            settings = Int8(calibrator=calibrator)
            assert resumed.histograms[name].choose(settings) == histogram.choose(settings)
    np.testing.assert_array_equal(resumed.mean("means"), whole.mean("means"))
    assert resumed.checks.problems() == whole.checks.problems() != ()
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


def test_the_size_of_the_state_does_not_grow_with_the_images(tmp_path):
    sizes = []
    for count in (17, 60):
        fed(Statistics(Preprocessing()), batches(count)).save(tmp_path / "state")
        sizes.append((tmp_path / "state").stat().st_size)
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.99], ids=["empty", "cut", "cut at the end"])
def test_a_cut_state_is_refused(keep, tmp_path):
    path = tmp_path / "state"
    fed(Statistics(), batches(3)).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(CalibrationError, match="not the statistics"):
        Statistics.load(path)


@pytest.mark.parametrize("seed", range(20))
def test_a_state_with_one_flipped_byte_is_refused_or_unharmed(seed, tmp_path):
    path = tmp_path / "state"
    whole = fed(Statistics(), batches(3))
    whole.save(path)
    content = bytearray(path.read_bytes())
    content[np.random.default_rng(seed).integers(len(content))] ^= 0x10
    path.write_bytes(content)
    try:
        found = Statistics.load(path)
    except CalibrationError:
        return
    assert (found.images, found.histograms.keys()) == (whole.images, whole.histograms.keys())
    for name, histogram in whole.histograms.items():
        np.testing.assert_array_equal(found.histograms[name].state(), histogram.state())


def test_an_archive_of_something_else_is_refused(tmp_path):
    np.savez(tmp_path / "other.npz", weights=np.zeros(3))
    with pytest.raises(CalibrationError, match="not the statistics"):
        Statistics.load(tmp_path / "other.npz")


def test_a_plan_tells_what_was_seen_of_each_tensor(residual):
    plan = plan_of(residual.graph, residual.images, Int8(calibrator="minmax"))
    stage1 = residual.run()[0]
    found = plan.statistics["stage1"]
    # Two graphs of one network differ by a last bit on some processors.
    assert found.low == pytest.approx(stage1.min(), rel=2e-7)
    assert found.high == pytest.approx(stage1.max(), rel=2e-7)
    # 6 maps of 4096 values are sampled whole.
    assert found.mean == pytest.approx(stage1.mean(dtype=np.float64), rel=1e-6)
    assert found.deviation == pytest.approx(stage1.std(dtype=np.float64), rel=1e-6)
    step = plan.ranges["stage1"].affine()[0]
    error = np.clip(np.round(stage1 / step), 0, 255) * step - stage1
    expected = 10 * np.log10(np.square(stage1, dtype=np.float64).sum() / np.square(error, dtype=np.float64).sum())
    assert found.sqnr_db == pytest.approx(expected, abs=0.5)


def test_calibrating_in_two_parts_gives_the_plan_of_one(residual):
    images = [image[None] for image in residual.images]
    started, settings = Statistics(), Int8(reduce_range=residual.plan.reduce_range)
    calibrate(residual.graph.model, images[:2], settings, key="", started=started)
    resumed = calibrate(residual.graph.model, images[2:], settings, key="0" * 64, started=started)
    assert resumed.ranges == residual.plan.ranges
    assert resumed.statistics == residual.plan.statistics
    assert resumed.images == 6
    for name, shift in residual.plan.bias_shift.items():
        np.testing.assert_array_equal(resumed.bias_shift[name], shift)
