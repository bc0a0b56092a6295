"""Small graphs of other quantizers, written out: what their plan holds, and what is refused by name."""

from __future__ import annotations

import re

import numpy as np
import onnx
import pytest

from deploykit.errors import QuantizedModelError, SpecError
from deploykit.export.import_quantized import import_quantized
from deploykit.onnx_session import onnx_session

WEIGHTS = np.array([[3, -50, 7], [100, 2, -127], [-9, 88, 41], [5, 5, 60]])
CONSTANTS = f"""
    float scale = {{0.05}}, uint8 zero = {{128}}, float other = {{0.07}}, float below = {{-0.05}}, uint8 none = {{0}},
    int8[4, 3, 1, 1] w = {{{", ".join(map(str, WEIGHTS.reshape(-1)))}}}, float ws = {{0.02}}, int8 wz = {{0}},
    float[4, 3, 1, 1] real = {{{", ".join(f"{each * 0.02 + 0.004:.4f}" for each in WEIGHTS.reshape(-1))}}},
    float[3] scales = {{0.05, 0.04, 0.03}}, uint8[3] zeros = {{0, 0, 0}}, uint8[3] middles = {{128, 128, 120}},
    int8[3] wzeros = {{0, 0, 0}}, float16 half = {{15360}}, int64[2] sides = {{5, 7}}, int64[2] axes = {{2, 3}},
    float[4, 1, 1, 1] blocks = {{0.02, 0.03, 0.04, 0.05}}, float[4, 4, 1, 1] square = {{{", ".join(["0.25"] * 16)}}}
"""
PAIR = "q = QuantizeLinear (images, scale, zero)  dq = DequantizeLinear (q, scale, zero)"
WEIGHT = "weight = DequantizeLinear (w, ws, wz)"
POOLED = "ReduceMean <keepdims = 0> (maps, axes)"


def write(folder, body: str, *, outputs: str = "float[1, 4] scores", images: str = "1", opset: int = 21):
    text = f"""<ir_version: 10, opset_import: ["" : {opset}, "com.microsoft" : 1]>
        g (float[{images}, 3, 8, 8] images) => ({outputs}) <{CONSTANTS}> {{ {body} }}"""
    model = onnx.parser.parse_model(text)
    for place, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}{place}"
    onnx.save(model, folder / "small.onnx")
    return folder / "small.onnx"


def taken(folder, body: str, **settings):
    return import_quantized(write(folder, body, **settings))


def whole(quantizers: str = PAIR, weight: str = WEIGHT, read: str = "dq") -> str:
    return f"{quantizers}  {weight}  maps = Conv ({read}, weight)  scores = {POOLED}"


def run(model, images: np.ndarray, *names: str) -> list[np.ndarray]:
    return onnx_session(model, optimize=False).run(list(names) or None, {"images": images})


def photo(count: int = 1) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(count, 3, 8, 8)).astype(np.float32)


@pytest.mark.parametrize(
    ("weight", "note"),
    [
        (WEIGHT, "as int8"),
        ("weight = DequantizeLinear (w, ws)", "without a zero point"),
        ("wq = QuantizeLinear (real, ws, wz)  weight = DequantizeLinear (wq, ws, wz)", "in float behind a pair"),
        ("weight = com.microsoft.DequantizeLinear (w, ws, wz)", "by ONNX Runtime's own operator"),
    ],
)
def test_a_weights_integers_are_those_of_the_file(tmp_path, weight, note):
    found = taken(tmp_path, whole(weight=weight))
    (name,), (use,) = found.plan.placement.weights.keys(), found.plan.placement.weights.values()
    values = found.master.model.graph.initializers[use.weight].const_value.numpy()
    integers, scales = found.plan.integers_of(name, values, use.axis)
    np.testing.assert_array_equal(integers.reshape(4, 3), WEIGHTS, note)
    np.testing.assert_allclose(scales, 0.02)
    assert found.plan.range_of("images").affine() == (pytest.approx(0.05), 128)


def test_feature_maps_become_levels_in_the_order_of_their_strides(tmp_path):
    body = f"{PAIR}  {WEIGHT}  fine = Conv (dq, weight)  coarse = Conv <strides = [4, 4]> (fine, square)"
    found = taken(tmp_path, body, outputs="float[1, 4, 2, 2] coarse, float[1, 4, 8, 8] fine")
    assert found.backbone.features_only
    assert [(level.stride, level.channels) for level in found.backbone.levels] == [(1, 4), (4, 4)]
    names = [level.name for level in found.backbone.levels]
    outputs = found.outputs_of_source(photo())
    assert {name: outputs[name].shape for name in names} == {names[0]: (1, 4, 8, 8), names[1]: (1, 4, 2, 2)}
    assert [output.name for output in found.master.outputs] == names


def test_a_batch_of_any_size_stays_one(tmp_path):
    found = taken(tmp_path, whole(), images='"N"', outputs='float["N", 4] scores')
    assert not isinstance(found.input.batch, int)
    (logits,) = run(found.source, photo(3), "logits")
    assert logits.shape == (3, 4)
    np.testing.assert_allclose(found.outputs_of_source(photo(3))["logits"], logits, rtol=1e-5)


def test_a_second_scale_of_one_tensor_is_said_and_the_first_stands(tmp_path):
    again = "q2 = QuantizeLinear (images, other, zero)  dq2 = DequantizeLinear (q2, other, zero)"
    body = f"{PAIR}  {again}  {WEIGHT}  first = Conv (dq, weight)  second = Conv (dq2, weight)"
    found = taken(tmp_path, f"{body}  maps = Add (first, second)  scores = {POOLED}")
    assert any("images has another scale already" in each for each in found.ignored)
    assert found.plan.range_of("images").affine()[0] == pytest.approx(0.05)


def test_two_quantizers_that_cut_at_zero_share_one_clip(tmp_path):
    cut = "q{0} = QuantizeLinear (maps, scale, none)  d{0} = DequantizeLinear (q{0}, scale, none)"
    body = f"{PAIR}  {WEIGHT}  maps = Conv (dq, weight)  {cut.format(1)}  {cut.format(2)}"
    found = taken(tmp_path, f"{body}  one = Exp (d1)  both = Add (one, d2)  scores = {POOLED.replace('maps', 'both')}")
    assert sum(node.op_type == "Clip" for node in found.master.model.graph) == 1


def test_images_that_are_given_out_again_are_an_output(tmp_path):
    body = f"{PAIR}  {WEIGHT}  maps = Conv (dq, weight)"
    found = taken(tmp_path, body, outputs="float[1, 4, 8, 8] maps, float[1, 3, 8, 8] dq")
    images = photo()
    outputs = run(found.master.model, images)
    assert [output.shape for output in outputs] == [(1, 4, 8, 8), (1, 3, 8, 8)]
    np.testing.assert_array_equal(outputs[1], images)


def test_a_layer_behind_several_moves_reads_the_integers_of_what_is_moved(tmp_path):
    moved = "a = MaxPool <kernel_shape = [2, 2]> (dq)  b = Identity (a)  c = Transpose <perm = [0, 1, 3, 2]> (b)"
    found = taken(tmp_path, whole(f"{PAIR}  {moved}", read="c"))
    (use,) = found.plan.placement.weights.values()
    assert found.plan.range_of(use.input).affine() == (pytest.approx(0.05), 128)


def test_a_layer_before_several_moves_reads_the_integers_behind_them(tmp_path):
    body = "a = Relu (images)  b = Transpose <perm = [0, 1, 3, 2]> (a)  c = Transpose <perm = [0, 1, 3, 2]> (b)"
    pair = "q = QuantizeLinear (c, scale, none)  dq = DequantizeLinear (q, scale, none)"
    found = taken(tmp_path, whole(f"{body}  {pair}"))
    assert len(found.plan.placement.weights) == 1


REFUSED = {
    "a scale of the images": (
        whole("m = ReduceMax <keepdims = 0> (images)  q = QuantizeLinear (images, m, zero) "
              "dq = DequantizeLinear (q, m, zero)"),
        r"QuantizeLinear\d takes its scale from a computation; expected a constant",
    ),
    "a negative scale": (
        whole(PAIR.replace("scale", "below")),
        r"Linear\d has a scale that is not a positive number",
    ),
    "halves that differ": (
        whole("q = QuantizeLinear (images, scale, zero)  dq = DequantizeLinear (q, other, zero)"),
        r"QuantizeLinear0 and DequantizeLinear1 differ in scale or zero point",
    ),
    "integers read elsewhere": (
        f"{PAIR}  {WEIGHT}  maps = Conv (dq, weight)  f = Cast <to = 1> (q)  s = {POOLED} "
        "m = ReduceMean <keepdims = 0> (f)  scores = Add (s, m)",
        r"the integers of QuantizeLinear0 are read by something else than a DequantizeLinear",
    ),
    "integers pooled": (
        whole("q = QuantizeLinear (images, scale, zero)  p = MaxPool <kernel_shape = [2, 2]> (q) "
              "dq = DequantizeLinear (p, scale, zero)"),
        r"DequantizeLinear2 restores integers that neither a QuantizeLinear nor a constant gives",
    ),
    "half precision": (
        whole("h = Cast <to = 10> (images)  q = QuantizeLinear (h, half, zero)  d = DequantizeLinear (q, half, zero) "
              "dq = Cast <to = 1> (d)"),
        r"QuantizeLinear1 is between integers and FLOAT16, DequantizeLinear2 is between integers and FLOAT16",
    ),
    "scales by blocks": (
        whole(weight="weight = DequantizeLinear <axis = 1, block_size = 3> (w, blocks)"),
        r"DequantizeLinear2 has one scale a block of 3",
    ),
    "zero points by channel": (
        whole("q = QuantizeLinear <axis = 1> (images, scales, middles) "
              "dq = DequantizeLinear <axis = 1> (q, scales, middles)"),
        r"quantizes the activation images with 3 scales and zero points 120 to 128 along axis 1",
    ),
    "weights by input channel": (
        whole(weight="weight = DequantizeLinear <axis = 1> (w, scales, wzeros)"),
        r"its weight has one scale for each index of axis 1; its output channels are axis 0",
    ),
    "only weights": (
        whole("", read="images"),
        r"what it reads has no scale in the imported model",
    ),
    "a shape that does not fit": (
        f"{PAIR}  {WEIGHT}  maps = Conv (dq, weight)  scores = Reshape (maps, sides)",
        r"the graph does not run on one batch of zeros",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_plan_has_no_place_for_is_named(tmp_path, name):
    body, message = REFUSED[name]
    with pytest.raises(QuantizedModelError, match=message):
        taken(tmp_path, body)


def test_a_type_of_its_own_for_the_floats_is_named(tmp_path):
    """Since opset 23 a DequantizeLinear says what floats it gives."""
    pair = PAIR.replace("DequantizeLinear", "DequantizeLinear <output_dtype = 10>")
    with pytest.raises(QuantizedModelError, match=r"DequantizeLinear1 is between integers and FLOAT16"):
        taken(tmp_path, whole(f"{pair}  d = Cast <to = 1> (dq)", read="d"), opset=23)


def test_outputs_of_other_ranks_are_named_with_their_shapes(tmp_path):
    body = f"{whole()}  total = ReduceSum <keepdims = 0> (maps, axes)"
    with pytest.raises(QuantizedModelError, match=re.escape("gives scores (1, 4), total (1, 4); expected one (N, D)")):
        taken(tmp_path, body, outputs="float[1, 4] scores, float[1, 4] total")


def test_a_target_that_the_runtime_has_not_is_named(tmp_path):
    found = taken(tmp_path, whole())
    with pytest.raises(SpecError, match=r"unknown onnxruntime target 'x86-avx3'; it has .*x86-avx2"):
        found.export(tmp_path / "out", runtime="onnxruntime", target="x86-avx3")
    assert not (tmp_path / "out").exists()
