"""``deploykit inspect``: a bundle's page, without the runtime."""

from __future__ import annotations

import json
import sys

import pytest

from tests.small_resnet import SMALL


@pytest.fixture(autouse=True)
def no_runtime(monkeypatch):
    """Neither the runtime nor onnx can be imported."""
    for name in ("onnxruntime", "onnx", "onnx_ir"):
        monkeypatch.setitem(sys.modules, name, None)


def test_the_page_tells_all_of_a_quantized_bundle(call, features):
    done = call("inspect", features)
    assert done.code == 0, done.err
    for expected in (
        f"{SMALL} (resnet)",
        "random, digest ",
        "1..4 x 3 x 64 x 64 float32 NCHW",
        "0.485 0.456 0.406; 0.229 0.224 0.225",
        "executed, every output within the budget",
        "seen on",
        "device cpu, onnxruntime ",
        "calibrator minmax",
        "minmax, 4 images",
        "noisiest",
        "fold-batchnorm",
        "model.onnx",
        "batch x 24 x 8 x 8",
        "budget 20 dB",
    ):
        assert expected in done.out
    assert done.out.splitlines()[-1] == f"Next: deploykit verify {features}"


def test_json_holds_the_manifest_the_parity_and_the_quantization(call, features):
    told = call("inspect", features, "--json").json()
    plan = json.loads((features / "quantization-plan.json").read_text())
    assert told["manifest"] == json.loads((features / "manifest.json").read_text())
    assert told["parity"] == json.loads((features / "parity.json").read_text())
    assert told["quantization"]["integer_weights"] == len(plan["placement"]["weights"]) > 0
    assert told["quantization"]["float_nodes"] == plan["placement"]["float_nodes"]
    assert told["quantization"]["reduce_range"] is plan["reduce_range"]
    noise = sorted(seen["sqnr_db"] for seen in plan["statistics"].values())
    assert list(told["quantization"]["noisiest"].values()) == noise[:3]


def test_a_float_bundle_has_no_quantization(call, classifier):
    assert call("inspect", classifier, "--json").json()["quantization"] is None
    assert "Quantization" not in call("inspect", classifier).out
