from dataclasses import replace

import numpy as np
import pytest
import torch

from deploykit.backends.inductor.passes import DIALECT as INDUCTOR
from deploykit.backends.onnxruntime.passes import DIALECT as ONNXRUNTIME
from deploykit.backends.openvino.passes import DIALECT as OPENVINO
from deploykit.backends.tensorrt.passes import DIALECT as TENSORRT
from deploykit.calibration.fake_quantized_network import EVERY_RUNTIME, FakeQuantizedNetwork
from deploykit.errors import CalibrationError
from deploykit.onnx_session import onnx_session
from deploykit.parity.metrics import sqnr_db
from deploykit.spec import Int8
from tests.calibration.networks import Gated, Padded, Residual, Tokens, Windows, float_network_of, plan_of, written
from tests.raw_engines import RUNS


def in_torch(module, images):
    with torch.no_grad():
        return [output.numpy() for output in module(torch.from_numpy(images))]


def as_written(dialect, case, plan):
    """What a dialect's graph gives when each node is computed as it is written."""
    session = onnx_session(written(dialect, case.graph, plan), optimize=False)
    runs = [session.run(None, {"images": image[None]}) for image in case.images]
    return [np.concatenate(parts) for parts in zip(*runs, strict=True)]


KINDS = {"residual": Residual, "tokens": Tokens, "windows": Windows, "gated": Gated, "padded": Padded}
DIALECTS = {"onnxruntime": ONNXRUNTIME, "openvino": OPENVINO}
SAFE = Int8(reduce_range=True)
"""With which no processor's products saturate."""


@pytest.fixture(scope="module")
def networks(request):
    cases = {name: request.getfixturevalue(name) for name in KINDS}
    return {name: (float_network_of(KINDS[name], case.master, case.images), case) for name, case in cases.items()}


@pytest.mark.parametrize("runtime", DIALECTS)
@pytest.mark.parametrize("name", ["residual", "gated", "padded"])
def test_it_computes_what_an_engine_computes(networks, name, runtime):
    network, case = networks[name]
    plan, dialect, run = plan_of(case.graph, case.images, SAFE), DIALECTS[runtime], RUNS[runtime]
    found = in_torch(FakeQuantizedNetwork(network, plan, dialect), case.images)
    model = written(dialect, case.graph, plan)
    engine = [run(model, {"images": image[None]}) for image in case.images]
    for output, one in zip(network.outputs, found, strict=True):
        other = np.concatenate([each[output] for each in engine])
        assert sqnr_db(other, one) > 60  # but for sums next to the middle of two integers


@pytest.mark.parametrize(
    ("name", "dialect"), [("residual", TENSORRT), ("tokens", OPENVINO), ("windows", OPENVINO), ("tokens", ONNXRUNTIME)]
)
def test_it_computes_what_the_dialect_writes(networks, name, dialect):
    network, case = networks[name]
    expected = as_written(dialect, case, case.plan)
    found = in_torch(FakeQuantizedNetwork(network, case.plan, dialect), case.images)
    in_float = in_torch(network.module, case.images)
    for one, other, exact in zip(expected, found, in_float, strict=True):
        # Some values next to a tie are rounded to the other side: far less than what rounding itself costs.
        assert sqnr_db(one, other) > min(sqnr_db(exact, one) + 5, 45)


def test_inductor_rounds_for_layers_and_for_one_summand(networks):
    network, case = networks["residual"]
    rounding = INDUCTOR.kernel_rounding(network.model, INDUCTOR.keep_float(network.model, case.plan))
    assert rounding.left_out == {"conv2d_2", "conv2d_5"}
    assert rounding.summands == {("max_pool2d", "add"), ("conv2d_4", "add_1")}
    program = INDUCTOR.render(case.program, case.plan, case.images).graph.program.module()
    with torch.no_grad():
        written = [program(torch.from_numpy(image[None])) for image in case.images]
    found = in_torch(FakeQuantizedNetwork(network, case.plan, INDUCTOR), case.images)
    for place, output in enumerate(found):
        assert sqnr_db(np.concatenate([each[place].numpy() for each in written]), output) > 50


def test_openvino_clips_what_a_convolution_adds_to_where_integers_are_read(networks):
    network, case = networks["residual"]
    rounding = OPENVINO.kernel_rounding(network.model, case.plan)
    assert rounding.clipped == {"conv2d_2"}  # the second sum is read by a mean and a product, in float
    readers = {name: "tested" for name, use in case.plan.placement.weights.items() if use.input == "stage1"}
    in_float = case.plan.without(network.model, readers)
    assert not OPENVINO.kernel_rounding(network.model, in_float).clipped


def test_what_was_learned_is_what_a_dialect_writes(networks):
    network, case = networks["residual"]
    module = FakeQuantizedNetwork(network, case.plan, TENSORRT)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in module.layers.values():
            weight = layer.weight.weight
            weight += layer.weight.step * 3 * torch.randn(weight.shape, generator=generator)
            layer.weight.log_scales += 0.1 * torch.randn(layer.weight.log_scales.shape, generator=generator)
            layer.bias.add_(0.1 * torch.randn(layer.bias.shape, generator=generator))
        for quantizer in module.quantizers.values():
            quantizer.log_scale += 0.1 * torch.randn((), generator=generator)
    learned = module.learned_plan()
    assert learned.placement == case.plan.placement
    assert learned.constants_digest == case.plan.constants_digest
    found, changed = in_torch(module, case.images), as_written(TENSORRT, case, learned)
    for one, other, before in zip(changed, found, as_written(TENSORRT, case, case.plan), strict=True):
        assert sqnr_db(one, other) > 35
        assert sqnr_db(one, before) < 25


def test_the_networks_own_modules_stay_as_they_are(networks):
    network, case = networks["residual"]
    before = in_torch(network.module, case.images)
    module = FakeQuantizedNetwork(network, case.plan)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1.0)
    for one, other in zip(before, in_torch(network.module, case.images), strict=True):
        assert np.array_equal(one, other)
    assert {id(each) for each in module.parameters()}.isdisjoint(id(each) for each in network.module.parameters())


def test_nodes_with_one_weight_share_its_quantizer(networks):
    network, case = networks["tokens"]
    module = FakeQuantizedNetwork(network, case.plan, EVERY_RUNTIME)
    weights = {}
    for layer in module.layers.values():
        weights.setdefault(layer.use.weight, set()).add(id(layer.weight))
    assert all(len(quantizers) == 1 for quantizers in weights.values())
    assert len(weights) < len(module.layers)


def test_a_batch_that_computes_something_else_is_told(networks):
    network, case = networks["residual"]
    with pytest.raises(CalibrationError, match="something else for a batch"):
        FakeQuantizedNetwork(replace(network, traced=networks["tokens"][0].traced), case.plan)
