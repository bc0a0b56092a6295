"""Multiply-adds and bytes of a graph small enough to count by hand, and of a runtime's own profile of it."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper


@pytest.fixture(scope="module")
def layers(script):
    return script("_layers")


def weight(name, *shape):
    return numpy_helper.from_array(np.ones(shape, np.float32), name)


def model_of(nodes, constants, shape, result):
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, shape)
    given = helper.make_tensor_value_info("result", TensorProto.FLOAT, result)
    graph = helper.make_graph(nodes, "counted", [images], [given], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


@pytest.fixture(scope="module")
def counted():
    """A dense, a depthwise and a pointwise convolution, a pooling, and a classifier."""
    nodes = [
        helper.make_node("Conv", ["images", "dense"], ["a"], name="dense", pads=[1, 1, 1, 1], strides=[2, 2]),
        helper.make_node("Relu", ["a"], ["b"], name="relu"),
        helper.make_node("Conv", ["b", "deep"], ["c"], name="deep", pads=[1, 1, 1, 1], group=8),
        helper.make_node("Conv", ["c", "point"], ["d"], name="point"),
        helper.make_node("GlobalAveragePool", ["d"], ["e"], name="pool"),
        helper.make_node("Flatten", ["e"], ["f"], name="flatten"),
        helper.make_node("Gemm", ["f", "head"], ["result"], name="head", transB=1),
    ]
    constants = [weight("dense", 8, 3, 3, 3), weight("deep", 8, 1, 3, 3), weight("point", 16, 8, 1, 1)]
    return model_of(nodes, [*constants, weight("head", 10, 16)], [1, 3, 8, 8], [1, 10])


def test_every_layer_of_a_graph_is_counted_as_by_hand(layers, counted):
    found = {layer.name: layer for layer in layers.layers_of(counted)}
    assert {name: (layer.kind, layer.macs) for name, layer in found.items()} == {
        "dense": ("convolution", 8 * 4 * 4 * 3 * 3 * 3),
        "relu": ("elementwise", 0),
        "deep": ("depthwise", 8 * 4 * 4 * 3 * 3),
        "point": ("pointwise", 16 * 4 * 4 * 8),
        "pool": ("pooling", 0),
        "flatten": ("movement", 0),
        "head": ("product", 16 * 10),
    }
    dense = found["dense"]
    assert dense.weight_bytes == 4 * 8 * 3 * 3 * 3
    assert dense.activation_bytes == 4 * (3 * 8 * 8 + 8 * 4 * 4)
    assert dense.bytes == dense.weight_bytes + dense.activation_bytes
    assert not any(layer.integer for layer in found.values())


def test_totals_are_by_type_and_leave_out_what_multiplies_nothing(layers, counted):
    totals = layers.macs_by_kind(layers.layers_of(counted))
    assert totals == {"convolution": 3456, "pointwise": 2048, "depthwise": 1152, "product": 160}


def test_products_of_two_activations_are_attention_and_batches_count(layers):
    nodes = [
        helper.make_node("Transpose", ["images"], ["keys"], name="keys", perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", ["images", "keys"], ["result"], name="scores"),
    ]
    found = layers.layers_of(model_of(nodes, [], [1, 4, 7, 16], [1, 4, 7, 7]))
    assert [(layer.kind, layer.macs) for layer in found] == [("movement", 0), ("attention", 4 * 7 * 7 * 16)]


def test_onnxruntimes_own_attention_counts_its_projections_and_what_is_behind_it(layers):
    nodes = [
        helper.make_node(
            "Attention", ["images", "qkv", "bias"], ["a"], name="attend", num_heads=2, domain="com.microsoft"
        ),
        helper.make_node("MatMul", ["a", "head"], ["result"], name="head"),
    ]
    model = model_of(nodes, [weight("qkv", 8, 24), weight("bias", 24), weight("head", 8, 3)], [1, 5, 8], None)
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    found = [(layer.kind, layer.macs) for layer in layers.layers_of(model)]
    assert found == [("attention", 5 * 8 * 24 + 2 * 5 * 5 * 8), ("product", 5 * 8 * 3)]


def test_a_layer_of_unknown_shape_is_an_error(layers):
    nodes = [helper.make_node("Conv", ["images", "dense"], ["result"], name="dense")]
    model = model_of(nodes, [weight("dense", 8, 3, 3, 3)], ["batch", 3, "height", "width"], None)
    with pytest.raises(ValueError, match="dense"):
        layers.layers_of(model)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_runtimes_profile_has_the_same_multiply_adds(script, layers, counted, tmp_path, runtime):
    path = tmp_path / "counted.onnx"
    onnx.save(counted, path)
    image = np.ones((1, 3, 8, 8), np.float32)
    kernels = script("_profiles").profiled(runtime, path, image, 3)
    assert all(kernel.milliseconds >= 0 for kernel in kernels)
    counts = layers.macs_by_kind(kernel.layer for kernel in kernels)
    assert counts == layers.macs_by_kind(layers.layers_of(counted))
    (dense,) = (kernel.layer for kernel in kernels if kernel.layer.kind == "convolution")
    assert dense.weight_bytes >= 4 * 8 * 3 * 3 * 3 and not dense.integer


def test_integer_chains_do_the_work_of_the_float_ones(script, layers):
    ceilings = script("_ceilings")
    for build in (ceilings.convolutions, ceilings.products):
        exact, rounded = (build(integers=integers) for integers in (False, True))
        macs = sum(layer.macs for layer in layers.layers_of(exact))
        assert macs == sum(layer.macs for layer in layers.layers_of(ceilings._with_float_weights(rounded)))
        onnx.checker.check_model(rounded)
    assert macs == 6 * 512 * 1024 * 1024


def test_time_is_split_into_what_arithmetic_and_memory_explain(script, layers):
    ceilings, limit, profiles = script("_ceilings"), script("limit"), script("_profiles")
    rows = [("convolution", "fp32", 1.0, "GMAC/s"), ("product", "int8", 4.0, "GMAC/s"), ("memory", "-", 1.0, "GB/s")]
    most = ceilings.Ceilings(
        rows=tuple(
            ceilings.Ceiling(work=work, precision=precision, runtime="here", value=value, unit=unit)
            for work, precision, value, unit in rows
        )
    )

    def kernel(macs, size, integer, milliseconds):
        layer = layers.Layer(
            name="n",
            operator="Conv",
            kind="convolution",
            macs=macs,
            weight_bytes=0,
            activation_bytes=size,
            integer=integer,
        )
        return profiles.Kernel(layer=layer, milliseconds=milliseconds)

    kernels = [kernel(4_000_000, 500_000, True, 2.0), kernel(1_000_000, 3_000_000, False, 5.0)]
    part = limit.split("convolution", kernels, most, "int8")
    assert (part.arithmetic_ms, part.memory_ms, part.float_ms) == (1.0 + 1.0, 2.0, 5.0)
    assert part.milliseconds == 7.0 and part.macs == 5_000_000
