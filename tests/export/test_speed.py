from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from deploykit import create_backbone, export_backbone, load_bundle
from deploykit.bundle import open_bundle
from deploykit.errors import ExportError
from deploykit.export.speed import SpeedReport, check_speedup, time_in_turns
from deploykit.timing import LEAST_ROUNDS
from tests.backbones.realistic import randomize
from tests.small_resnet import SMALL

SLOWER = SpeedReport(
    fp32_ms=2.0,
    int8_ms=4.0,
    rounds=9,
    float_nodes={f"node{index}": "because" for index in range(8)},
    left={"DequantizeLinear": 3},
)


@pytest.fixture(scope="module")
def backbone():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return randomize(create_backbone(SMALL, image_size=64, num_classes=10)).eval()


@pytest.fixture(scope="module")
def timed(backbone, photographs, tmp_path_factory):
    """An INT8 bundle that was timed."""
    return export_backbone(
        *(backbone, tmp_path_factory.mktemp("timed") / "bundle"),
        runtime="onnxruntime",
        precision="int8",
        calibration=photographs,
        time_against_fp32=True,
    )


def test_the_ratio_is_in_the_manifest_and_told(timed):
    report = timed.speed
    assert open_bundle(timed.folder).speedup == timed.manifest.speedup == round(report.speedup, 3)
    assert report.fp32_ms > 0
    assert report.int8_ms > 0
    assert report.rounds >= LEAST_ROUNDS
    assert report.fp16_ms > 0
    assert report.float_nodes == {}
    assert not [operator for operator in report.left if "Conv" in operator]


@pytest.mark.slow
def test_an_export_that_was_not_asked_is_not_timed(backbone, photographs, tmp_path):
    result = export_backbone(
        backbone, tmp_path / "bundle", runtime="onnxruntime", precision="int8", calibration=photographs
    )
    assert result.speed is None
    assert result.manifest.speedup is None


@pytest.mark.slow
def test_a_float_engine_is_not_timed_against_itself(backbone, tmp_path):
    result = export_backbone(backbone, tmp_path / "bundle", runtime="onnxruntime", require_speedup=True)
    assert result.manifest.speedup is None
    assert result.speed is None


def test_models_are_called_in_turns_and_the_median_is_theirs(timed, monkeypatch):
    with load_bundle(timed.folder) as one, load_bundle(timed.folder) as other:
        calls = []
        for name, model in (("one", one), ("other", other)):
            run = model._run
            monkeypatch.setattr(model, "_run", lambda images, run=run, name=name: calls.append(name) or run(images))
        images = np.zeros((3, 3, 64, 64), np.float32)
        medians, rounds = time_in_turns((one, other), images)
    assert calls == ["one", "other"] * 2 + ["one", "one", "other", "other"] * rounds
    assert all(0 < value < 1000 for value in medians)


def test_a_slower_engine_is_told_with_its_reasons():
    assert SLOWER.speedup == 0.5
    assert "slower" in SLOWER.sentence()
    assert "0.50" in SLOWER.sentence()
    reasons = SLOWER.reasons()
    assert reasons[0] == "stays in float: node0: because"
    assert reasons[-2] == "and 2 more nodes stay in float: see quantization-plan.json"
    assert reasons[-1] == "the runtime's optimized graph still has 3 DequantizeLinear"
    assert not replace(SLOWER, int8_ms=1.5).slower
    assert replace(SLOWER, int8_ms=1.5, fp16_ms=1.0).slower
    assert "0.67 times as fast as fp16" in replace(SLOWER, int8_ms=1.5, fp16_ms=1.0).sentence()
    assert replace(SLOWER, float_nodes={}, left={}).reasons()[0].startswith("every node of the plan runs in integers")


def test_a_required_speedup_refuses_a_slower_or_untimed_engine():
    with pytest.raises(ExportError, match=r"slower[\s\S]*node0: because[\s\S]*leave require_speedup out"):
        check_speedup(SLOWER, "onnxruntime")
    with pytest.raises(ExportError, match="tensorrt cannot time the engine here"):
        check_speedup(None, "tensorrt")
    check_speedup(replace(SLOWER, int8_ms=1.0), "onnxruntime")


def test_a_required_speedup_that_is_missed_leaves_nothing(backbone, photographs, tmp_path, monkeypatch):
    monkeypatch.setattr("deploykit.export.evaluate.time_in_turns", lambda models, images: ([1.0, 2.0], 7))
    with pytest.raises(ExportError, match="A speedup is required"):
        export_backbone(
            *(backbone, tmp_path / "bundle"),
            runtime="onnxruntime",
            precision="int8",
            calibration=photographs,
            require_speedup=True,
        )
    assert not (tmp_path / "bundle").exists()
