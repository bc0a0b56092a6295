"""Weights for processors where sums of two products saturate."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import numpy as np
import onnx
import pytest
from onnx import helper

from deploykit.backends.backend import resolve
from deploykit.backends.inductor import passes as inductor
from deploykit.backends.openvino import passes as openvino
from deploykit.backends.table import load_backend
from deploykit.calibration.plan import QuantizationPlan, plan_key
from deploykit.calibration.ranges import quantize_weight
from deploykit.parity.metrics import sqnr_db
from deploykit.spec import Int8
from tests.calibration.networks import plan_of, rounding_noise_db, written


@pytest.fixture(scope="module")
def plans(residual) -> dict[bool, QuantizationPlan]:
    """By whether the range is reduced."""
    return {reduced: plan_of(residual.graph, residual.images, Int8(reduce_range=reduced)) for reduced in (False, True)}


def largest_pair(integers: np.ndarray) -> int:
    """The largest sum of two weights of one sign in an output channel, the longest axis left for any order."""
    best = 0
    for axis in (0, integers.ndim - 1):
        channels = np.moveaxis(integers.astype(int), axis, 0).reshape(integers.shape[axis], -1)
        ordered = np.sort(channels, axis=1)
        pairs = max(ordered[:, -2:].sum(1).max(), -ordered[:, :2].sum(1).min())
        best = pairs if best == 0 else min(best, pairs)
    return int(best)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino", "tensorrt"])
def test_no_two_weights_of_a_graph_add_up_to_more_than_fits(runtime, residual, plans):
    dialect = resolve(str(load_backend(runtime).dialect))
    for reduced, plan in plans.items():
        values = written(dialect, residual.graph, plan).graph.initializers.values()
        arrays = [value.const_value.numpy() for value in values]
        found = [largest_pair(array) for array in arrays if array.dtype == np.int8 and array.ndim > 1]
        assert len(found) >= 7
        assert (max(found) <= 128) is reduced


def test_no_two_weights_of_a_torch_program_add_up_to_more_than_fits(residual, plans):
    rendered = inductor.DIALECT.render(residual.program, plans[True], residual.images)
    state = rendered.graph.program.state_dict
    found = [largest_pair(value.numpy()) for name, value in state.items() if name.endswith("_integers")]
    assert len(found) >= 7
    assert max(found) <= 128


def test_a_reduced_range_costs_a_few_decibels_and_biases_are_corrected_for_it(residual, plans):
    expected = residual.run()
    noise = {
        reduced: rounding_noise_db(expected, residual.run(written(openvino.DIALECT, residual.graph, plan)))
        for reduced, plan in plans.items()
    }
    assert noise[True][-1] > 20
    assert np.mean(noise[False]) > np.mean(noise[True])
    node = next(iter(plans[False].bias_shift))
    assert not np.array_equal(plans[True].bias_shift[node], plans[False].bias_shift[node])


def test_the_plan_says_it_and_is_keyed_by_it(plans, tmp_path):
    assert [plans[reduced].reduce_range for reduced in (False, True)] == [False, True]
    plans[True].save(tmp_path)
    assert QuantizationPlan.load(tmp_path).reduce_range
    keys = {value: plan_key("w", "i", Int8(reduce_range=value)) for value in (None, False, True)}
    assert keys[None] == keys[False] != keys[True]


def one_convolution(*, reduce_range: bool) -> tuple[onnx.ModelProto, np.ndarray]:
    """A 1x1 convolution ``(64 -> 32)`` whose weights are all the largest, in pairs of one sign; and its weight."""
    signs = np.repeat(np.random.default_rng(0).choice([-1, 1], (32, 32)), 2, axis=1).astype(np.float32)
    integers, scales = quantize_weight(signs, 0, reduce_range=reduce_range)
    constants = {
        "step": np.float32(1 / 255),
        "zero": np.uint8(0),
        "integers": integers[..., None, None],
        "scales": scales,
        "zeros": np.zeros(32, np.int8),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["images", "step", "zero"], ["rounded"]),
        helper.make_node("DequantizeLinear", ["rounded", "step", "zero"], ["maps"]),
        helper.make_node("DequantizeLinear", ["integers", "scales", "zeros"], ["weight"], axis=0),
        helper.make_node("Conv", ["maps", "weight"], ["out"]),
    ]
    ends = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, channels, 8, 8])
        for name, channels in (("images", 64), ("out", 32))
    ]
    initializers = [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "convolution", ends[:1], ends[1:], initializers)
    opsets = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9), integers * scales[:, None]


RUN = """
import sys
import numpy as np, openvino
core = openvino.Core()
model = core.read_model(sys.argv[1])
compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
np.save(sys.argv[3], compiled([np.load(sys.argv[2])])[0])
"""


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="vpmaddubsw is an instruction of x86")
@pytest.mark.parametrize("reduced", [False, True])
def test_openvino_without_vnni_is_exact_when_the_range_is_reduced_and_only_then(reduced, tmp_path):
    """oneDNN acts as on a processor with AVX2 alone; ONNX Runtime has no such switch."""
    pytest.importorskip("openvino", reason="openvino is not installed")
    model, weight = one_convolution(reduce_range=reduced)
    onnx.save(model, tmp_path / "model.onnx")
    images = np.random.default_rng(1).uniform(0.7, 1, (1, 64, 8, 8)).astype(np.float32)
    np.save(tmp_path / "images.npy", images)
    exact = np.einsum("oc,nchw->nohw", weight.astype(np.float64), np.round(images * 255) / 255)
    subprocess.run(
        [sys.executable, "-c", RUN, *(str(tmp_path / name) for name in ("model.onnx", "images.npy", "out.npy"))],
        env=os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "1"},
        check=True,
    )
    noise = sqnr_db(exact, np.load(tmp_path / "out.npy"))
    assert (noise > 100) is reduced
    assert (noise < 20) is not reduced
