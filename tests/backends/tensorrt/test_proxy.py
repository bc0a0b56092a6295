"""The exact graph that TensorRT is given, evaluated node by node without TensorRT: a proxy, and called one.

Two implementations evaluate it, and neither uses a processor's INT8 or FP16 kernels, so that the figures are the same
everywhere. What OpenVINO's kernels make of it on one machine, benchmarks/tensorrt_builds.py prints.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")

from deploykit.arrays import FloatArray
from deploykit.backends.backend import LowerOptions
from deploykit.backends.tensorrt.cuda_driver import cuda_capabilities
from deploykit.backends.tensorrt.legalize import prepare
from deploykit.backends.tensorrt.lower import lower_portable
from deploykit.parity.metrics import sqnr_db
from tests.backends.tensorrt.families import PRECISIONS, SMALL, Family, family, in_onnxruntime, in_reference
from tests.conftest_graphs import manifest_of, open_engine, spec_of

QUICK = ("mobilenet", "vit")
FLOORS_DB = {"hybrid": 8.0}
"""Below INT8's budget, which would refuse its export: with random weights, symmetric INT8 leaves 9.0 dB of it, and
uint8 with zero points, which TensorRT refuses, 11.7."""


def figures(case: Family, outputs: list[FloatArray], names: tuple[str, ...]) -> np.ndarray:
    return np.array([sqnr_db(case.expected[name], found) for name, found in zip(names, outputs, strict=True)])


@pytest.mark.slow  # ONNX's own implementation takes a minute for a network
@pytest.mark.parametrize("precision", ["int8", "int8+fp16"])
@pytest.mark.parametrize("name", SMALL)
def test_two_implementations_agree_on_the_figure_of_every_level_and_the_logits(
    name: str, precision: str, photographs: Path
):
    case = family(name, photographs, dynamic=False)
    model = prepare(case.whole(precision).model)
    names = tuple(value.name for value in model.graph.output)
    assert names == (*case.levels, "logits")
    here = figures(case, in_onnxruntime(model, case.images), names)
    there = figures(case, in_reference(model, case.images), names)
    assert np.abs(here - there).max() < 1.0
    assert here.min() > FLOORS_DB.get(name, PRECISIONS[precision].min_sqnr_db)


@pytest.mark.parametrize("precision", ["int8", "int8+fp16"])
@pytest.mark.parametrize("name", QUICK)
def test_what_tensorrt_is_given_computes_what_its_dialect_wrote(name: str, precision: str, photographs: Path):
    case = family(name, photographs, dynamic=False)
    written = case.whole(precision).model
    for one, other in zip(
        in_onnxruntime(ir.to_proto(written), case.images), in_onnxruntime(prepare(written), case.images), strict=True
    ):
        np.testing.assert_array_equal(one, other)


@pytest.mark.gpu
@pytest.mark.skipif(not cuda_capabilities(), reason="no CUDA device")
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", SMALL)
def test_the_plans_own_figure_is_within_1_db_of_the_proxys(
    name: str, precision: str, photographs: Path, tmp_path: Path
):
    case = family(name, photographs, dynamic=False)
    graph = case.graph(precision, features=True)
    engine = lower_portable(graph, tmp_path, LowerOptions())
    manifest = replace(
        manifest_of("tensorrt", graph, engine),
        backbone=replace(spec_of(features_only=True), name=name),
        outputs=graph.outputs,
    )
    with open_engine(manifest, tmp_path) as model:
        runs = [model(image[None]) for image in case.images]
    found = [np.concatenate([run[level] for run in runs]) for level in case.levels]
    budget = PRECISIONS[precision].min_sqnr_db
    plan = figures(case, found, case.levels)
    proxy = figures(case, in_onnxruntime(prepare(graph.model), case.images), case.levels)
    assert plan.min() > budget
    if precision.startswith("int8"):
        assert np.abs(plan - proxy).max() < 1.0


@pytest.mark.parametrize("name", QUICK)
def test_what_stays_in_float_beside_int8_computes_in_fp16_where_asked(name: str, photographs: Path):
    from tests.backends.tensorrt.forms import Parsed

    model = prepare(family(name, photographs, dynamic=False).graph("int8+fp16", features=True).model)
    parsed = Parsed(model)
    assert parsed.accepted, parsed.complaints
    assert parsed.warnings == []
    kinds = {str(parsed.network.get_layer(i).type.name) for i in range(parsed.network.num_layers)}
    assert {"QUANTIZE", "DEQUANTIZE", "CAST"} < kinds
    computing = ("CONVOLUTION", "MATRIX_MULTIPLY", "DEQUANTIZE")
    layers = [parsed.network.get_layer(i) for i in range(parsed.network.num_layers)]
    types = {layer.get_output(0).dtype.name for layer in layers if layer.type.name in computing}
    assert types == {"HALF"}
