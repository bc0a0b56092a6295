from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest

from deploykit.backends.backend import resolve
from deploykit.backends.onnxruntime.integer_attention import PARTS
from deploykit.backends.openvino import passes as openvino
from deploykit.backends.table import load_backend
from deploykit.calibration.dialect import Dialect
from deploykit.calibration.plan import QuantizationPlan
from deploykit.calibration.reconstruction import needs_reconstruction, reconstruct
from deploykit.calibration.sensitivity import Simulation
from deploykit.spec import Int8
from tests.calibration.networks import rounding_noise_db, written

ADAPTIVE = Int8(rounding="adaptive")
FULL = Int8(bias_correction="full")


@pytest.fixture(scope="module", params=["residual", "tokens"])
def network(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def adaptive(network) -> QuantizationPlan:
    return reconstruct(network.graph.model, network.plan, network.images, ADAPTIVE)


def constants_of(case) -> dict[str, np.ndarray]:
    return {name: value.const_value.numpy() for name, value in case.graph.model.graph.initializers.items()}


def noise_of_weights(network, plan) -> list[float]:
    """SQNR in dB of every output of the master graph with the plan's weights and biases in the place of its own."""
    simulation = Simulation(network.graph.model, plan, network.images, most=len(network.images))
    simulation._exact |= {
        key: value
        for rounded in simulation._rounded.values()
        for key, value in rounded.items()
        if not key.endswith("/quantized")
    }
    return rounding_noise_db(network.run(), simulation._run(()))


def test_only_settings_that_ask_for_more_read_the_images_again():
    assert not needs_reconstruction(Int8())
    assert not needs_reconstruction(Int8(bias_correction=False))
    assert all(map(needs_reconstruction, (ADAPTIVE, FULL, Int8(weight_scales="mse"))))


def test_adaptive_rounding_takes_noise_out_of_the_weights(network, adaptive):
    before, after = noise_of_weights(network, network.plan), noise_of_weights(network, adaptive)
    assert np.mean(after) > np.mean(before) + 1


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino", "tensorrt", "torch_compile"])
def test_every_dialect_writes_the_integers_of_the_plan(network, adaptive, runtime):
    dialect: Dialect = resolve(str(load_backend(runtime).dialect))
    plan = dialect.keep_float(network.graph.model, adaptive)
    if runtime == "torch_compile":
        program = dialect.render(network.program, plan, network.images).graph.program
        buffers = program.module().named_buffers()
        found = {value.numpy().tobytes() for name, value in buffers if name.endswith("_integers")}
    else:
        values = written(dialect, network.graph, plan).graph.initializers.values()
        tensors = {value.name: value.const_value for value in values}
        integers = {name: tensor.numpy() for name, tensor in tensors.items() if tensor.dtype == ir.DataType.INT8}
        integers = {name: array for name, array in integers.items() if array.shape}
        cut = [[f"{name}_{part}_integers" for part in PARTS] for name in plan.placement.weights]
        joined = [np.hstack([integers[name] for name in names]) for names in cut if names[0] in integers]
        found = {array.tobytes() for array in (*integers.values(), *joined)}
    constants = constants_of(network)
    first = {use.weight: name for name, use in reversed(plan.placement.weights.items())}
    moved = 0
    for name, use in plan.placement.weights.items():
        if runtime == "torch_compile" and name != first[use.weight]:
            continue  # a parameter of the program is rounded once, for all that share it
        expected, _ = adaptive.weights[name].integers_of(constants[use.weight], use.axis)
        assert found & {expected.tobytes(), np.ascontiguousarray(expected.T).tobytes()}, name
        moved += bool(adaptive.weights[name].steps.any())
    assert moved


def test_a_reconstructed_plan_survives_being_saved_and_loaded(network, adaptive, tmp_path):
    adaptive.save(tmp_path)
    loaded = QuantizationPlan.load(tmp_path)
    one, other = (ir.to_proto(written(openvino.DIALECT, network.graph, plan)) for plan in (adaptive, loaded))
    assert one.SerializeToString(deterministic=True) == other.SerializeToString(deterministic=True)


def test_reconstructing_twice_gives_the_same_plan(network, adaptive):
    again = reconstruct(network.graph.model, network.plan, network.images, ADAPTIVE)
    for name, chosen in adaptive.weights.items():
        np.testing.assert_array_equal(again.weights[name].steps, chosen.steps)
        np.testing.assert_array_equal(again.bias_shift[name], adaptive.bias_shift[name])


def test_rounding_to_the_nearest_shifts_biases_as_the_first_pass_does(residual):
    """The means are from a sample of positions, the first pass's from all."""
    again = reconstruct(residual.graph.model, residual.plan, residual.images, Int8())
    for name, shift in residual.plan.bias_shift.items():
        assert not again.weights[name].steps.any()
        assert np.abs(again.bias_shift[name] - shift).max() < 0.1 * np.abs(shift).max() + 1e-6


def test_full_bias_correction_makes_up_for_the_layers_before_and_fast_does_not(residual):
    """Ranges that clip shift what the layers behind them read."""
    clipping = {name: replace(chosen, high=0.6 * chosen.high) for name, chosen in residual.plan.ranges.items()}
    plan = replace(residual.plan, ranges=clipping)

    def mean_error_of_logits(plan) -> float:
        simulation = Simulation(residual.graph.model, plan, residual.images, most=len(residual.images))
        expected, found = simulation._run(()), simulation._run(plan.placement.weights)
        return float(np.abs((expected[-1] - found[-1]).mean(axis=0)).max())

    full = reconstruct(residual.graph.model, plan, residual.images, FULL)
    assert mean_error_of_logits(full) < 0.1 * mean_error_of_logits(plan)


def test_without_bias_correction_no_bias_is_shifted(residual):
    settings = Int8(rounding="adaptive", bias_correction=None)
    assert not reconstruct(residual.graph.model, residual.plan, residual.images, settings).bias_shift


@pytest.mark.parametrize("settings", [ADAPTIVE, FULL, Int8(weight_scales="mse")], ids=["adaptive", "full", "mse"])
def test_no_two_weights_of_a_reduced_range_saturate(residual, settings):
    plan = reconstruct(residual.graph.model, replace(residual.plan, reduce_range=True), residual.images, settings)
    constants = constants_of(residual)
    for name, use in plan.placement.weights.items():
        integers, _ = plan.integers_of(name, constants[use.weight], use.axis)
        channels = np.moveaxis(integers, use.axis, 0).reshape(integers.shape[use.axis], -1).astype(int)
        for values in (channels, -channels):
            assert np.sort(np.maximum(values, 0), axis=1)[:, -2:].sum(axis=1).max() <= 128


def test_clipped_scales_are_below_the_largest_weight(residual):
    whole = replace(residual.plan, reduce_range=False)  # a reduced range has scales of its own
    plan = reconstruct(residual.graph.model, whole, residual.images, Int8(weight_scales="mse"))
    plain = reconstruct(residual.graph.model, whole, residual.images, Int8())
    ratios = np.concatenate([plan.weights[name].scales / plain.weights[name].scales for name in plan.weights])
    assert ratios.max() <= 1
    assert ratios.min() < 1
