"""Weights of 7 bits, for processors whose products of 8-bit weights saturate."""

from __future__ import annotations

import importlib

import numpy as np
import onnx
import pytest

from deploykit.calibration.dialects import DIALECTS
from deploykit.calibration.dialects import inductor as inductor_dialect
from deploykit.calibration.dialects import openvino as openvino_dialect
from deploykit.calibration.plan import QuantizationPlan, plan_key
from deploykit.processor import Processor
from deploykit.spec import Int8
from tests.calibration.networks import plan_of, rounding_noise_db

OLD = Processor(model="old", cores=1, int8=("AVX2",), absent=("AVX512-VNNI", "AVX-VNNI", "AMX-INT8"))


@pytest.fixture(scope="module")
def plans(residual) -> dict[int, QuantizationPlan]:
    return {bits: plan_of(residual.graph, residual.images, Int8(reduce_range=bits == 7)) for bits in (7, 8)}


def largest_weights(model: onnx.ModelProto) -> dict[str, int]:
    """The largest magnitude of each int8 weight of a graph."""
    weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    return {
        name: int(np.abs(values.astype(int)).max())
        for name, values in weights.items()
        if values.dtype == np.int8 and values.ndim > 1
    }


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino", "tensorrt"])
def test_every_weight_of_a_graph_stays_in_7_bits(runtime, residual, plans):
    render = importlib.import_module(DIALECTS[runtime].partition(":")[0]).render
    for bits, top in ((7, 63), (8, 127)):
        found = largest_weights(render(residual.graph, plans[bits]).model)
        assert len(found) >= 7
        assert set(found.values()) == {top}


def test_every_weight_of_a_torch_program_stays_in_7_bits(residual, plans):
    state = inductor_dialect.render(residual.graph, plans[7]).program.state_dict
    largest = {int(value.abs().max()) for name, value in state.items() if name.endswith("_integers")}
    assert largest == {63}


def test_a_bit_less_costs_a_few_decibels_and_the_bias_is_corrected_for_it(residual, plans):
    expected = residual.run()
    noise = {
        bits: rounding_noise_db(expected, residual.run(openvino_dialect.render(residual.graph, plan).model))
        for bits, plan in plans.items()
    }
    assert noise[7][-1] > 20
    assert np.mean(noise[8]) > np.mean(noise[7])
    node = next(iter(plans[8].bias_shift))
    assert not np.array_equal(plans[7].bias_shift[node], plans[8].bias_shift[node])


def test_the_plan_says_its_bits_and_is_keyed_by_them(plans, tmp_path):
    assert (plans[7].weight_bits, plans[8].weight_bits) == (7, 8)
    plans[7].save(tmp_path)
    assert QuantizationPlan.load(tmp_path).weight_bits == 7
    keys = {value: plan_key("w", "i", Int8(reduce_range=value)) for value in (None, False, True)}
    assert keys[None] == keys[False] != keys[True]


SIMULATED = """
import sys
import numpy as np, openvino
folder = sys.argv[1]
core = openvino.Core()
images, found = np.load(f"{folder}/images.npy"), []
settings = {"INFERENCE_PRECISION_HINT": "f32"}
for bits in (7, 8):
    compiled = core.compile_model(core.read_model(f"{folder}/{bits}.onnx"), "CPU", settings)
    np.save(f"{folder}/{bits}.npy", np.concatenate([compiled([image[None]])[0] for image in images]))
"""
