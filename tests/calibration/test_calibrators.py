"""The ranges of each calibrator beside references that know nothing of histograms."""

from __future__ import annotations

import numpy as np
import pytest

from deploykit.calibration.ranges import ActivationRange, Histogram
from deploykit.spec import Int8


def swish(values: np.ndarray) -> np.ndarray:
    return values / (1 + np.exp(-values))


SHAPES = {
    "normal": lambda generator: generator.normal(size=16384),
    "heavy tails": lambda generator: generator.standard_t(3, size=16384),
    "relu": lambda generator: np.maximum(generator.normal(size=16384), 0),
    "swish": lambda generator: swish(2 * generator.normal(size=16384)),
    "one outlier": lambda generator: np.append(generator.normal(size=16383), 40.0),
    "far from zero": lambda generator: generator.normal(5, 0.5, size=16384),
}


@pytest.fixture(params=SHAPES)
def values(request) -> np.ndarray:
    """``(1, 16384)`` float32: every value is sampled."""
    return SHAPES[request.param](np.random.default_rng(1)).astype(np.float32)[None]


def chosen(values: np.ndarray, **settings) -> ActivationRange:
    histogram = Histogram()
    histogram.update(values)
    return histogram.choose(Int8(**settings))


def rounding_error(values: np.ndarray, low: float, high: float) -> float:
    """The mean squared error of uint8, from the values themselves."""
    scale = (high - low) / 255
    zero_point = round(-low / scale)
    rounded = np.clip(np.round(values.astype(np.float64) / scale) + zero_point, 0, 255) - zero_point
    return float(np.mean((rounded * scale - values) ** 2))


def test_minmax_is_that_of_numpy(values):
    found = chosen(values, calibrator="minmax")
    assert (found.low, found.high) == (min(values.min(), 0), max(values.max(), 0))


@pytest.mark.parametrize("percentile", [99.0, 99.9])
def test_a_percentile_is_that_of_numpy_to_a_bin(values, percentile):
    found = chosen(values, calibrator="percentile", percentile=percentile)
    both = values.min() < 0 < values.max()
    tail = (100 - percentile) / (2 if both else 1)
    bin_width = float(2 * np.abs(values).max() / 2048)
    high = np.percentile(values, 100 - tail, method="inverted_cdf")
    low = np.percentile(values, tail, method="inverted_cdf") if values.min() < 0 else 0.0
    assert found.high == pytest.approx(high, abs=bin_width)
    assert found.low == pytest.approx(low, abs=bin_width)


def test_the_least_squared_error_is_near_that_of_a_search_over_both_ends(values):
    found = chosen(values, calibrator="mse")
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    shares = np.linspace(0.02, 1, 50)
    lows = low * shares if low < 0 else [0.0]
    best = min(rounding_error(values, one, other) for one in lows for other in high * shares)
    assert rounding_error(values, found.low, found.high) < 1.06 * best


def onnxruntime_entropy(values: np.ndarray) -> float:
    """The larger magnitude that ONNX Runtime's entropy calibrator keeps of these values."""
    calibrate = pytest.importorskip("onnxruntime.quantization.calibrate", reason="onnxruntime is not installed")
    edge = float(np.abs(values).max())
    counts, edges = np.histogram(values, 2048, (-edge, edge))
    collector = calibrate.HistogramCollector("entropy", False, 2048, 128, 99.99, "same")
    ends = collector.get_entropy_threshold((counts, edges, values.min(), values.max(), edge), 128)
    return float(np.abs(ends).max())


@pytest.mark.parametrize("shape", ["normal", "one outlier"])
def test_entropy_clips_where_onnxruntime_does(shape):
    values = SHAPES[shape](np.random.default_rng(1)).astype(np.float32)[None]
    assert chosen(values, calibrator="entropy").amax == pytest.approx(onnxruntime_entropy(values), rel=0.15)


def test_entropy_of_a_relu_rounds_better_than_that_of_onnxruntime():
    """ONNX Runtime's is led by the zeros: it clips at 2.7 standard deviations, and so does not agree here."""
    values = SHAPES["relu"](np.random.default_rng(1)).astype(np.float32)[None]
    ours, theirs = chosen(values, calibrator="entropy").amax, onnxruntime_entropy(values)
    assert rounding_error(values, 0.0, ours) < 0.2 * rounding_error(values, 0.0, theirs)
