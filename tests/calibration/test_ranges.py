from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from deploykit.calibration import ranges
from deploykit.calibration.counting import BINS, SAMPLES_PER_IMAGE, TAIL_SHARE, read_values
from deploykit.calibration.ranges import ActivationRange, Histogram, quantize_weight
from deploykit.errors import CalibrationError
from deploykit.sampling import sample_positions
from deploykit.spec import Int8

FLOATS = st.floats(-1e6, 1e6, width=32)
BATCHES = st.lists(
    hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=3, max_side=6), elements=FLOATS),
    min_size=1,
    max_size=5,
)
CALIBRATORS = st.sampled_from(["mse", "minmax", "percentile", "entropy"])


def histogram_of(batches) -> Histogram:
    histogram = Histogram()
    for batch in batches:
        histogram.update(batch)
    return histogram


def affine_error(values: np.ndarray, measured: ActivationRange) -> float:
    scale, zero_point = measured.affine()
    integers = np.clip(np.round(values / scale) + zero_point, 0, 255)
    return float(np.square((integers - zero_point) * scale - values).mean())


def symmetric_error(values: np.ndarray, measured: ActivationRange) -> float:
    step = measured.symmetric()
    return float(np.square(np.clip(np.round(values / step), -127, 127) * step - values).mean())


@settings(max_examples=80, deadline=None)
@given(BATCHES)
def test_minimum_and_maximum_are_exact(batches):
    histogram = histogram_of(batches)
    assert histogram.low == min(batch.min() for batch in batches)
    assert histogram.high == max(batch.max() for batch in batches)


@settings(max_examples=80, deadline=None)
@given(BATCHES)
@example([np.array([[1e-45]], np.float32)])
@example([np.array([[1e-45]], np.float32), np.array([[3e38]], np.float32)])
def test_widening_the_bins_loses_no_count(batches):
    histogram = histogram_of(batches)
    seen = 0
    for batch in batches:
        # Bins exist from the first value that is not 0.
        seen = seen + batch.size if seen or batch.any() else 0
    assert histogram._counts.sum() == seen
    assert histogram._counts.shape == (BINS,)


def test_memory_is_constant_in_the_number_of_images():
    generator = np.random.default_rng(0)
    histogram = Histogram()
    shapes = set()
    for scale in (1e-3, 1, 1e3, 1, 1e5):
        histogram.update(generator.normal(scale=scale, size=(2, 3, 64, 64)).astype(np.float32))
        shapes.add(histogram._counts.nbytes)
    assert shapes == {BINS * 8}


@settings(max_examples=120, deadline=None)
@given(BATCHES, CALIBRATORS, st.floats(90, 100))
def test_every_range_holds_zero_and_lies_inside_the_values(batches, calibrator, percentile):
    histogram = histogram_of(batches)
    found = histogram.choose(Int8(calibrator=calibrator, percentile=percentile))
    low, high = min(histogram.low, 0.0), max(histogram.high, 0.0)
    assert low <= found.low <= 0 <= found.high <= high
    assert 0 <= found.amax <= max(-low, high)
    scale, zero_point = found.affine()
    assert np.isfinite(scale)
    assert scale > 0
    assert 0 <= zero_point <= 255
    assert found.symmetric() > 0


def test_minmax_takes_the_exact_range():
    found = histogram_of([np.array([[-1.5, 0.25]], np.float32), np.array([[3.0]], np.float32)]).choose(
        Int8(calibrator="minmax")
    )
    assert found == ActivationRange(low=-1.5, high=3.0, amax=3.0)


@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_least_error_beats_minmax_on_heavy_tails(positive, seed):
    values = np.random.default_rng(seed).standard_t(2.5, size=(4, 20000)).astype(np.float32)
    values = np.abs(values) if positive else values
    histogram = histogram_of(values[:, None])
    chosen, whole = (histogram.choose(Int8(calibrator=name)) for name in ("mse", "minmax"))
    assert affine_error(values, chosen) < 0.98 * affine_error(values, whole)
    assert symmetric_error(values, chosen) <= symmetric_error(values, whole)


def test_a_percentile_leaves_out_that_share_of_the_values():
    values = np.random.default_rng(0).normal(size=(1, 16000)).astype(np.float32)
    found = histogram_of([values]).choose(Int8(calibrator="percentile", percentile=98))
    outside = np.mean((values < found.low) | (values > found.high))
    assert outside == pytest.approx(0.02, abs=0.005)


def test_entropy_clips_a_heavy_tail_and_keeps_a_uniform_range_whole():
    generator = np.random.default_rng(0)
    tailed = generator.standard_t(2.5, size=(4, 1, 20000)).astype(np.float32)
    flat = generator.uniform(-1, 1, size=(4, 1, 20000)).astype(np.float32)
    clipped, whole = (histogram_of([values]).choose(Int8(calibrator="entropy")) for values in (tailed, flat))
    assert 3 < clipped.amax < 0.7 * np.abs(tailed).max()
    assert clipped.low == -clipped.amax
    assert whole.amax > 0.97


def test_entropy_is_not_led_by_the_zeros_of_a_relu():
    values = np.maximum(np.random.default_rng(0).normal(size=(4, 1, 20000)), 0).astype(np.float32)
    zeros = np.zeros((4, 1, 200000), np.float32)
    alone, many = (histogram_of(batches).choose(Int8(calibrator="entropy")) for batches in ([values], [values, zeros]))
    assert alone.low == 0
    assert many == alone
    assert alone.amax > 2.5


@pytest.mark.parametrize("size", [128, 256, 512, 1024])
def test_the_divergence_is_that_of_the_published_loop(size):
    """Migacz 2017 as printed, at sizes that divide evenly into the 128 levels."""
    counts = np.random.default_rng(1).poisson(np.geomspace(400, 0.05, 1024)).astype(np.float64)
    reference = counts[:size].copy()
    reference[-1] += counts[size:].sum()
    rounded = np.zeros(size)
    for part in np.array_split(np.arange(size), 128):
        used = part[counts[part] > 0]
        rounded[used] = counts[used].sum() / max(len(used), 1)
    p, q = reference / reference.sum(), rounded / rounded.sum()
    expected = sum(p[i] * np.log(p[i] / max(q[i], 1e-12)) for i in range(size) if p[i] > 0)
    assert ranges._divergence(counts, size) == pytest.approx(expected)


@pytest.mark.parametrize("calibrator", ["mse", "minmax", "percentile", "entropy"])
@pytest.mark.parametrize("value", [0.0, 1e-40, -1e-40, 7.0])
def test_a_constant_tensor_has_a_finite_scale(calibrator, value):
    found = histogram_of([np.full((2, 8), value, np.float32)] * 2).choose(Int8(calibrator=calibrator))
    scale, zero_point = found.affine()
    assert np.isfinite([scale, found.symmetric()]).all()
    assert (round(value / scale) + zero_point - zero_point) * scale == pytest.approx(value, rel=0.02, abs=1e-9)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_activations_that_are_not_finite_are_refused(bad):
    with pytest.raises(CalibrationError, match="NaN or infinite"):
        Histogram().update(np.array([[1.0, bad]], np.float32))


def test_a_range_of_nothing_is_refused():
    with pytest.raises(CalibrationError, match="no batch was seen"):
        Histogram().choose(Int8())


@settings(max_examples=80, deadline=None)
@given(
    hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=4, max_side=5), elements=st.floats(-50, 50, width=32)),
    st.integers(0, 1),
)
def test_a_weight_is_rounded_by_at_most_half_a_step(weight, axis):
    integers, scales = quantize_weight(weight, axis)
    shape = [1] * weight.ndim
    shape[axis] = -1
    steps = scales.reshape(shape).astype(np.float64)
    assert integers.dtype == np.int8
    assert integers.min() >= -127
    assert scales.shape == (weight.shape[axis],)
    assert np.isfinite(scales).all()
    assert (scales > 0).all()
    assert (np.abs(integers * steps - weight) <= 0.5001 * steps).all()


def test_a_channel_of_zeros_stays_zero_with_a_finite_scale():
    weight = np.zeros((3, 4, 1, 1), np.float32)
    weight[1] = 0.5
    integers, scales = quantize_weight(weight, 0)
    assert np.isfinite(1 / scales).all()
    assert not integers[[0, 2]].any()
    assert (integers[1] == 127).all()


@pytest.mark.parametrize("bounds", [(-np.inf, np.inf), (0.0, np.inf), (-np.inf, 0.0), (0.0, 0.5)])
def test_every_value_beyond_the_sample_is_counted_once(bounds):
    values = np.clip(np.random.default_rng(0).normal(size=(1, 200_000)), *bounds).astype(np.float32)
    read = read_values(values, first=0)
    assert (read.low, read.high) == (values.min(), values.max())
    tails, inner = read.counted(max(-read.low, read.high)).parts
    sampled = np.sort(values.reshape(-1)[sample_positions(values.size, SAMPLES_PER_IMAGE, first=0)])
    beyond = len(sampled) // TAIL_SHARE
    outside = values[(values < sampled[beyond]) | (values > sampled[-1 - beyond])]
    assert tails.weight == 1.0
    assert tails.bins.sum() == len(outside)
    assert tails.total == pytest.approx(outside.sum(dtype=np.float64))
    assert inner.weight * inner.bins.sum() == pytest.approx(values.size - len(outside))
