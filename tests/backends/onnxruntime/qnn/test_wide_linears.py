"""Linears read and write uint16, in ranges that nothing can leave."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from deploykit.backends.onnxruntime.qnn.passes import DIALECT
from deploykit.backends.onnxruntime.qnn.wide_linears import reach
from deploykit.onnx_session import onnx_session
from deploykit.onnx_values import array_of
from tests.backends.onnxruntime.qnn.conftest import half_of


@given(st.integers(0, 2**32 - 1), st.floats(-8, 0), st.floats(0, 8))
def test_no_product_leaves_its_reach(seed, low, high):
    generator = np.random.default_rng(seed)
    weight = generator.standard_normal((12, 5)).astype(np.float32)
    least, most = reach(weight, low, high)
    inside = generator.uniform(low, high, (50, 12)).astype(np.float32) @ weight
    corner = np.where(weight > 0, high, low)
    room = 1e-4 * max(1.0, most - least)
    assert inside.min() >= least - room
    assert inside.max() <= most + room
    assert np.isclose((corner * weight).sum(axis=0).max(), most, atol=room)


def test_every_planned_linear_reads_and_writes_16_bits(tokens):
    model = DIALECT.render(tokens.graph, tokens.plan, tokens.images).graph.model
    products = [node for node in model.graph if node.op_type == "MatMul" and _is_restored(node.inputs[1])]
    planned = [name for name, use in tokens.plan.placement.weights.items()]
    convolutions = [node for node in model.graph if node.op_type == "Conv"]
    assert len(products) + len(convolutions) == len(planned)
    assert len(products) > 3
    for product in products:
        (pair,) = product.outputs[0].consumers()
        assert pair.op_type == "QuantizeLinear"
        for quantizer in (pair, product.inputs[0].producer()):
            assert array_of(quantizer.inputs[2]).dtype == np.uint16


def test_wide_integers_lose_less_than_the_weights_do(tokens):
    """The same network with exact activations and integer weights differs little from it."""
    expected = tokens.run()
    model = DIALECT.render(tokens.graph, tokens.plan, tokens.images).graph.model
    from deploykit.parity.metrics import sqnr_db

    session = onnx_session(model, optimize=False)
    for place, values in enumerate(expected):
        own = np.concatenate([session.run(None, {"images": image[None]})[place] for image in tokens.images])
        assert sqnr_db(values, own) > 25


def test_half_precision_keeps_every_pair(tokens):
    whole = DIALECT.render(tokens.graph, tokens.plan, tokens.images).graph.model
    half = DIALECT.render(tokens.graph, half_of(tokens.plan), tokens.images).graph.model
    counts = [sum(node.op_type == "QuantizeLinear" for node in model.graph) for model in (whole, half)]
    assert counts[0] == counts[1]


def _is_restored(value) -> bool:
    producer = value.producer() if value is not None else None
    return producer is not None and producer.op_type == "DequantizeLinear"
