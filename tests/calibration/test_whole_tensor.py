"""Statistics see every channel and every position alike, in any layout and size."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploykit.calibration import counting
from deploykit.calibration.counting import BINS
from deploykit.calibration.ranges import ActivationRange, Histogram
from deploykit.errors import CalibrationError
from deploykit.spec import Int8

SIDES = (7, 13, 16, 27, 31, 32, 56, 61, 64, 89, 96, 112, 127, 128, 144, 233, 256)
WIDTHS = (3, 16, 24, 31, 40, 64, 89, 96, 128, 256, 377, 512, 768, 1024)
LAYOUTS = {
    "NCHW": {"channel": 1, "row": 2, "column": 3},
    "NHWC": {"channel": 3, "row": 1, "column": 2},
    "tokens": {"channel": 2, "token": 1},
}
MOST_VALUES = 1_000_000


def whole_histogram(values: np.ndarray) -> Histogram:
    """The histogram of every value."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(counting, "SAMPLES_PER_IMAGE", values.size)
        patch.setattr(counting, "MOST_SAMPLES", values.size)
        histogram = Histogram()
        histogram.update(values)
    assert histogram._counts.sum() == values.size
    return histogram


def histogram_of(values: np.ndarray) -> Histogram:
    histogram = Histogram()
    histogram.update(values)
    return histogram


def sqnr_db(values: np.ndarray, chosen: ActivationRange) -> float:
    scale, zero_point = chosen.affine()
    rounded = (np.clip(np.round(values / scale) + zero_point, 0, 255) - zero_point) * scale
    return float(10 * np.log10(np.square(values, dtype=np.float64).sum() / np.square(rounded - values).sum()))


@dataclass(frozen=True, kw_only=True)
class Case:
    """An activation in which one class of positions is louder or quieter than the others."""

    shape: tuple[int, ...]
    where: tuple[slice | int, ...]
    factor: float
    positive: bool
    seed: int

    def values(self) -> np.ndarray:
        values = np.random.default_rng(self.seed).standard_normal(self.shape).astype(np.float32)
        values[self.where] *= np.float32(self.factor)
        return np.maximum(values, 0) if self.positive else values


@st.composite
def cases(draw):
    layout = draw(st.sampled_from(list(LAYOUTS)))
    channels, rows, columns = draw(st.sampled_from(WIDTHS)), draw(st.sampled_from(SIDES)), draw(st.sampled_from(SIDES))
    images = draw(st.sampled_from((1, 2, 3)))
    while channels * rows * columns < 3 * counting.SAMPLES_PER_IMAGE:
        rows, columns = 2 * rows + 1, 2 * columns
    while images * channels * rows * columns > MOST_VALUES:
        images, channels, rows = 1, max(1, channels // 2), max(8, rows // 2)
    shape = {
        "NCHW": (images, channels, rows, columns),
        "NHWC": (images, rows, columns, channels),
        "tokens": (images, rows * columns, channels),
    }[layout]
    axes = {name: axis for name, axis in LAYOUTS[layout].items() if shape[axis] > 1}
    kind = draw(st.sampled_from((*axes, "corner", "every second", "border")))
    where: list[slice | int] = [slice(None)] * len(shape)
    if kind == "corner":
        for axis in (axis for name, axis in axes.items() if name != "channel"):
            where[axis] = draw(st.sampled_from((0, -1)))
    else:
        axis = axes[kind] if kind in axes else draw(st.sampled_from(list(axes.values())))
        one = draw(st.integers(0, shape[axis] - 1))
        where[axis] = {"every second": slice(one % 2, None, 2), "border": slice(-(-shape[axis] // 5))}.get(kind, one)
    return Case(
        shape=shape,
        where=tuple(where),
        factor=draw(st.sampled_from((0.02, 0.3, 4.0, 20.0))),
        positive=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )


@settings(max_examples=40, deadline=None)
@given(cases())
def test_the_sampled_distribution_is_that_of_all_values(case):
    values = case.values()
    sampled, whole = histogram_of(values), whole_histogram(values)
    assert (sampled.low, sampled.high) == (values.min(), values.max())
    shares = [np.cumsum(each._counts) / values.size for each in (sampled, whole)]
    assert shares[0][-1] == pytest.approx(1)
    assert np.abs(shares[0] - shares[1]).max() < 0.02
    tail = BINS // 2 + np.flatnonzero(1 - shares[1][BINS // 2 :] < 0.002)
    np.testing.assert_allclose(shares[0][tail], shares[1][tail], atol=1e-9)


@pytest.mark.parametrize("factor", [0.05, 4.0], ids=["quiet", "loud"])
@pytest.mark.parametrize(
    "shape",
    [(1, 64, 256, 256), (1, 512, 32, 32), (2, 256, 64, 64), (1, 128, 128, 64), (1, 1024, 256), (1, 85, 85, 16)],
    ids=str,
)
def test_sizes_that_a_step_divides_hide_no_column(shape, factor):
    """The last axis is the width, the channels, or the embedding."""
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    values[..., 0] *= np.float32(factor)
    shares = [np.cumsum(each._counts) / values.size for each in (histogram_of(values), whole_histogram(values))]
    assert np.abs(shares[0] - shares[1]).max() < 0.02


@settings(max_examples=25, deadline=None)
@given(
    cases(), st.sampled_from((Int8(), Int8(calibrator="percentile"), Int8(calibrator="percentile", percentile=99.9)))
)
def test_a_range_is_as_good_as_that_of_all_values(case, chosen_by):
    values = case.values()
    chosen, best = (each.choose(chosen_by) for each in (histogram_of(values), whole_histogram(values)))
    assert sqnr_db(values, chosen) > sqnr_db(values, best) - 0.3


@settings(max_examples=15, deadline=None)
@given(cases())
def test_mean_and_deviation_are_those_of_all_values(case):
    values = case.values()
    histogram = histogram_of(values)
    found = histogram.statistics(histogram.choose(Int8()))
    deviation = float(values.std(dtype=np.float64))
    assert found.mean == pytest.approx(float(values.mean(dtype=np.float64)), abs=0.03 * deviation)
    assert found.deviation == pytest.approx(deviation, rel=0.03)


@pytest.mark.parametrize("shape", [(1, 64, 256, 256), (1, 197, 768), (1, 256, 256, 64)], ids=str)
def test_the_values_of_one_position_are_all_counted_where_they_are_the_loudest(shape):
    """A corner, a class token: of 16384 samples it would have a few, or none."""
    values = np.random.default_rng(0).uniform(0, 1, shape).astype(np.float32)
    corner = (0, slice(None), 0, 0) if shape[1] == 64 else (0, 0, 0) if len(shape) == 4 else (0, 0)
    values[corner] += 2
    counts = histogram_of(values)._counts
    edge = values.max()
    above = np.linspace(-edge, edge, BINS + 1)[:-1] > 1.5
    assert counts[above].sum() == (values > 1.5).sum() == values[corner].size


def test_tokens_along_the_first_axis_are_sampled_as_one_batch():
    """A matrix product reads ``(N * T, C)``: its first axis is no number of images."""
    values = np.random.default_rng(0).standard_normal((9000, 768)).astype(np.float32)
    values[:, 5] *= 30
    chosen, best = (each.choose(Int8()) for each in (histogram_of(values), whole_histogram(values)))
    assert sqnr_db(values, chosen) > sqnr_db(values, best) - 0.3


def test_each_batch_is_sampled_at_other_positions():
    """So that many images together show what one shows too rarely."""
    values = np.arange(2**20, dtype=np.float32).reshape(1, 16, 256, 256)
    histogram = histogram_of(values)
    first = histogram._sum
    histogram.update(values)
    assert histogram._sum - first != first
    assert histogram._sum / 2 == pytest.approx(values.sum(dtype=np.float64), rel=1e-3)


def test_an_activation_without_values_is_refused():
    with pytest.raises(CalibrationError, match=r"\(0, 3\), which holds no values"):
        Histogram().update(np.zeros((0, 3), np.float32))


def test_a_scalar_is_taken():
    assert histogram_of(np.float32(3) * np.ones(())).high == 3
