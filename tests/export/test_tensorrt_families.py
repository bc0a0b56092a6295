"""Every family is built by the real TensorRT-RTX, with no warning about a type; without a GPU none is run."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")

from deploykit.backbones.registry import FAMILIES
from deploykit.errors import ExportError
from deploykit.export.tensorrt_linter import quantize_layers
from deploykit.export.to_tensorrt import to_tensorrt
from tests.export.tensorrt_families import PRECISIONS, SMALL, family

CAPABILITIES = ("sm86", "sm89", "sm120")
QUICK = ("mobilenet", "vit", "convnext")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_turing_is_built_for_in_half_precision_or_explains_itself(precision: str, photographs: Path, tmp_path: Path):
    graph = family("mobilenet", photographs, dynamic=False).graph(precision, features=False)
    if "fp16" in precision:
        assert to_tensorrt(graph, tmp_path, target="t4").requires["compute_capability"] == "sm75"
        return
    with pytest.raises(ExportError, match=r"no FP32 matrix product for sm75 \(Turing\).*float_dtype='fp16'"):
        to_tensorrt(graph, tmp_path, target="t4")
    assert not list(tmp_path.iterdir())


def test_every_family_is_here():
    assert list(SMALL) == list(FAMILIES)


@pytest.mark.parametrize(
    "name", [each if each in QUICK else pytest.param(each, marks=pytest.mark.slow) for each in SMALL]
)
def test_a_family_is_built_in_int8_with_fp16(name: str, photographs: Path, tmp_path: Path):
    graph = family(name, photographs, dynamic=False).graph("int8+fp16", features=False)
    assert quantize_layers(graph.model)["QuantizeLinear INT8"] > 3
    engine = to_tensorrt(graph, tmp_path, target="sm89", time_limit=120)
    assert (tmp_path / engine.file).stat().st_size > 100_000


@pytest.mark.slow
@pytest.mark.parametrize("features", [False, True], ids=["logits", "features"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", SMALL)
def test_a_family_is_built_for_every_gpu(
    name: str, precision: str, dynamic: bool, features: bool, photographs: Path, tmp_path: Path
):
    graph = family(name, photographs, dynamic=dynamic).graph(precision, features=features)
    for capability in CAPABILITIES:
        engine = to_tensorrt(graph, tmp_path, target=capability, time_limit=300)
        assert (tmp_path / engine.file).stat().st_size > 100_000
        assert engine.requires["compute_capability"] == capability
