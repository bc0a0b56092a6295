"""Every family is built by the real TensorRT-RTX, with no warning about a type; without a GPU none is run."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import onnx_ir as ir
import pytest

pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")

from deploykit.backbones.registry import FAMILIES
from deploykit.backends.backend import LowerOptions
from deploykit.backends.tensorrt.legalize import quantize_layers
from deploykit.backends.tensorrt.lower import lower
from deploykit.errors import ExportError
from tests.backends.tensorrt.families import PRECISIONS, SHORT, SMALL, family

CAPABILITIES = ("sm86", "sm89", "sm120")
BATCHES = ("static", "dynamic")
OUTPUTS = ("logits", "features")
EVERY = tuple(product(SMALL, PRECISIONS, CAPABILITIES, BATCHES, OUTPUTS))
"""The whole matrix; benchmarks/tensorrt_builds.py prints it with times and sizes."""


QUICK = (
    ("resnet", "fp32", "sm86", "static", "logits"),
    ("mobilenet", "int8", "sm89", "static", "features"),
    ("vit", "int8+fp16", "sm120", "static", "features"),
    ("convnext", "fp16", "sm89", "dynamic", "logits"),
)
"""Four families, in which every precision, GPU, batch and kind of output comes; slow tests build the others.

The transformers are of few blocks here, and whole in the slow tests.
"""


@pytest.mark.parametrize(
    "precision", [name if "int8" in name else pytest.param(name, marks=pytest.mark.slow) for name in PRECISIONS]
)
def test_turing_is_built_for_in_half_precision_or_explains_itself(precision: str, photographs: Path, tmp_path: Path):
    graph = family("mobilenet", photographs, dynamic=False).graph(precision, features=False)
    if "fp16" in precision:
        assert lower(graph, tmp_path, LowerOptions(target="t4")).requires["compute_capability"] == "sm75"
        return
    with pytest.raises(ExportError, match=r"no FP32 matrix product for sm75 \(Turing\).*float_dtype='fp16'"):
        lower(graph, tmp_path, LowerOptions(target="t4"))
    assert not list(tmp_path.iterdir())


def test_every_family_is_here_and_every_choice_is_made_in_the_quick_cases():
    assert list(SMALL) == list(FAMILIES)
    chosen = [set(choices) for choices in zip(*QUICK, strict=True)][1:]
    assert chosen == [set(PRECISIONS), set(CAPABILITIES), set(BATCHES), set(OUTPUTS)]


@pytest.mark.parametrize(
    ("name", "precision", "capability", "batch", "outputs", "short"),
    [
        *((*case, case[0] in SHORT) for case in QUICK),
        *(
            pytest.param(*case, False, marks=pytest.mark.slow)
            for case in EVERY
            if case not in QUICK or case[0] in SHORT
        ),
    ],
)
def test_a_family_is_built(
    name: str, precision: str, capability: str, batch: str, outputs: str, short: bool, photographs: Path, tmp_path: Path
):
    case = family(name, photographs, dynamic=batch == "dynamic", short=short)
    graph = case.graph(precision, features=outputs == "features")
    if precision.startswith("int8"):
        assert quantize_layers(ir.to_proto(graph.model))["QuantizeLinear INT8"] > 3
    engine = lower(graph, tmp_path, LowerOptions(target=capability), time_limit=300)
    assert (tmp_path / engine.file).stat().st_size > 100_000
    assert engine.requires["compute_capability"] == capability
