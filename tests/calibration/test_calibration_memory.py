"""The bar of the benchmark on a small network: the whole one takes minutes."""

from __future__ import annotations

import importlib
from pathlib import Path

import onnx_ir as ir
import pytest

FEW, MANY = 16, 128


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("calibration_memory")


def test_the_peak_of_a_process_does_not_grow_with_the_images(benchmark, residual, tmp_path):
    pytest.importorskip("skimage", reason="scikit-image is not installed")
    photographs = benchmark.write_photographs(tmp_path / "photographs", MANY, 72)
    assert len(list(photographs.iterdir())) == MANY
    ir.save(residual.graph.model, tmp_path / "master.onnx")
    few, many = (
        benchmark.in_a_process(
            benchmark.__file__, ["--here", str(tmp_path / "master.onnx"), str(photographs), str(count), "entropy"]
        )
        for count in (FEW, MANY)
    )
    assert many["peak_mb"] < 1.1 * few["peak_mb"]
    assert many["peak_mb"] - many["before_mb"] > 1  # else nothing was measured
