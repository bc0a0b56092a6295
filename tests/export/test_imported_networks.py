"""NNCF's graphs of real networks: placed as they came, each layer with their integers, and how near the whole comes."""

from __future__ import annotations

import warnings

import numpy as np
import onnx_ir as ir
import pytest

import deploykit
from deploykit.backends.backend import resolve
from deploykit.backends.table import load_backend
from deploykit.calibration.images import calibration_set
from deploykit.errors import WeightsError
from deploykit.export.import_quantized import import_quantized
from deploykit.export.to_onnx import to_onnx
from deploykit.export.trace import output_names, trace
from deploykit.onnx_session import onnx_session
from deploykit.parity.metrics import sqnr_db
from tests.export.forced_integers import differences, integers_of, quantizers
from tests.export.quantized_models import images, network, quantize_static
from tests.raw_engines import RUNS

RUNTIMES = ("onnxruntime", "openvino")
SAME = {"onnxruntime": 0.99, "openvino": 0.9999}
"""The least share of equal integers, layer by layer: ONNX Runtime's kernels take biases as integers."""
NETWORKS = {"mobilenetv2_100": {"num_classes": 0}, "efficientnet_lite0": {}}


def rendered(found, runtime, probe):
    dialect = resolve(load_backend(runtime).dialect)
    return dialect.render(found.master, dialect.keep_float(found.master.model, found.plan), probe).graph.model


def check_layers(found, runtime, shown):
    """Every quantizer of the tool has its place, no other has, and each layer gives the tool's integers."""
    model, feeds = rendered(found, runtime, shown), {found.input.name: shown[:1]}
    assert set(quantizers(model)) == set(quantizers(found.source))
    apart = differences(model, integers_of(found.source, feeds), feeds, RUNS[runtime])
    assert max(np.abs(each).max() for each in apart.values()) <= 1
    total = sum(each.size for each in apart.values())
    assert sum(np.count_nonzero(each) for each in apart.values()) <= (1 - SAME[runtime]) * total


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_each_layer_of_a_small_network_has_the_tools_integers(tmp_path, runtime):
    options = {"OpTypesToExcludeOutputQuantization": ["Gemm"]}  # its scores, which a plan leaves in float
    path = quantize_static(tmp_path, network(), per_channel=True, extra_options=options)
    check_layers(import_quantized(path), runtime, images())


@pytest.fixture(scope="module", params=NETWORKS)
def imported(request, photographs, tmp_path_factory):
    """NNCF's graph of a network with its ImageNet weights, taken apart, and crops of the photographs."""
    nncf = pytest.importorskip("nncf", reason="nncf is not installed")
    try:
        backbone = deploykit.create_backbone(request.param, pretrained=True, **NETWORKS[request.param])
    except WeightsError as error:
        pytest.skip(f"no weights: {error}")
    spec = backbone.input_spec
    crops = calibration_set(photographs, spec).sample(6)
    shown = np.concatenate([crops, crops[..., ::-1]])
    names = output_names(backbone)
    model = to_onnx(trace(backbone, spec), spec, names)
    head = next(value for value in model.graph.outputs if value.name == names[-1])
    model.graph.outputs.clear()
    model.graph.outputs.append(head)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = nncf.quantize(
            ir.to_proto(model),
            nncf.Dataset(list(crops), lambda crop: {spec.name: crop[None]}),
            subset_size=len(crops),
            preset=nncf.QuantizationPreset.MIXED,
        )
    path = tmp_path_factory.mktemp("nncf") / "nncf.onnx"
    ir.save(ir.from_proto(quantized), path)
    return import_quantized(path), np.ascontiguousarray(shown)


@pytest.mark.slow
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_each_layer_of_a_real_network_has_nncfs_integers(imported, runtime):
    found, shown = imported
    assert found.ignored == ()
    check_layers(found, runtime, shown)


@pytest.mark.slow
def test_nncfs_graph_itself_is_not_known_to_35_db(imported):
    """Moved by a ten-millionth, which is less than floats in another order differ by, it gives other numbers."""
    found, shown = imported
    moved = found.source.clone()
    generator = np.random.default_rng(0)
    for node in moved.graph:
        if node.op_type == "Conv":
            bias = node.inputs[2].const_value.numpy()
            change = 1 + 1e-7 * generator.choice([-1, 1], bias.shape)
            node.inputs[2].const_value = ir.tensor((bias * change).astype(np.float32))
    outputs = []
    for model in (found.source, moved):
        session = onnx_session(model, optimize=False)
        outputs.append(np.concatenate([session.run(None, {found.input.name: crop[None]})[0] for crop in shown]))
    assert 20 < sqnr_db(*outputs) < 35


@pytest.mark.slow
@pytest.mark.xfail(strict=True, reason="27 to 31 dB; two ways of adding floats agree on NNCF's own graph no better")
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_an_engine_has_the_numbers_of_nncfs_graph(imported, runtime, tmp_path):
    found, shown = imported
    found.export(tmp_path / "engine", runtime=runtime, images=shown, min_sqnr_db=10)
    expected = next(iter(found.outputs_of_source(shown).values()))
    with deploykit.load_bundle(tmp_path / "engine") as engine:
        own = np.concatenate([engine(crop[None]) for crop in shown])
    assert sqnr_db(expected, own) >= 35
