"""Moved positions against onnx's own evaluator, and what is no movement."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from deploykit.fusion.data_movement import joined_again, moved, source

CONSTANTS = "int64[1] zero = {0}, int64[1] one = {1}, int64[1] three = {3}, int64[1] four = {4}, int64[1] two = {2}"


def graph(body: str, initializers: str = "", result: str = "z") -> ir.Model:
    """The graph of these nodes from ``x``, ``(2, 4, 3)``, to ``z``."""
    text = f"""<ir_version: 8, opset_import: ["" : 18]> g (float[2, 4, 3] x, int64[1] at) => (float[] {result})
               <{CONSTANTS}{initializers}> {{ {body} }}"""
    proto = onnx.parser.parse_model(text)
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    return ir.from_proto(proto)


def value(model: ir.Model, name: str) -> ir.Value:
    values = [*model.graph.inputs, *(each for node in model.graph for each in node.outputs)]
    return next(each for each in values if each.name == name)


def numbers(batch: int = 2) -> np.ndarray:
    return np.arange(batch * 12).reshape(batch, 4, 3)


MOVES = {
    "roll": "a = Slice(x, zero, one, one)  b = Slice(x, one, four, one)  y = Concat <axis = 1> (b, a)",
    "split and back": "a, b = Split <axis = 1, num_outputs = 2> (x)  y = Concat <axis = 1> (b, a)",
    "unequal split": "a, b = Split <axis = 1> (x, parts)  y = Concat <axis = 1> (b, a)",
    "permuted": "y = Transpose <perm = [0, 2, 1]> (x)",
    "reversed": "y = Transpose (x)",
    "reshaped and squeezed": "a = Reshape (x, sides)  b = Slice (a, zero, one, two)  y = Squeeze (b, two)",
    "every second": "y = Slice (x, zero, four, one, two)",
}
SIDES = ", int64[4] sides = {0, 2, 2, 3}, int64[2] parts = {1, 3}"


@pytest.mark.parametrize("name", MOVES)
def test_positions_go_where_the_numbers_go(name):
    model = graph(f"{MOVES[name]}  z = Neg (y)", SIDES)
    images = numbers().astype(np.float32)
    (expected,) = ReferenceEvaluator(ir.to_proto(model)).run(None, {"x": images, "at": np.zeros(1, np.int64)})
    start, end = value(model, "x"), value(model, "y")
    np.testing.assert_array_equal(moved(end, start, numbers()), -expected)
    assert source(end) is start


STOPS = {
    "computed": ("y = Neg (x)", "y"),
    "partly computed": ("a = Slice(x, zero, one, one)  b = Neg (x)  y = Concat <axis = 1> (a, b)", "y"),
    "of two": ("a = Neg (x)  y = Concat <axis = 1> (x, a)", "y"),
    "cut at run time": ("y = Slice (x, at, four, one)", "x"),
    "without axes": ("y = Slice (x, zero, one)", "x"),
    "sizes at run time": ("y = Reshape (x, at)", "x"),
}


@pytest.mark.parametrize("name", STOPS)
def test_what_is_computed_or_not_known_is_no_movement(name):
    body, first = STOPS[name]
    model = graph(f"{body}  z = Neg (y)")
    assert moved(value(model, "y"), value(model, "x"), numbers()) is None
    assert source(value(model, "y")) is value(model, first)


def test_a_shape_for_another_batch_is_no_movement():
    model = graph("y = Reshape (x, sides)  z = Neg (y)", ", int64[3] sides = {2, 3, 4}")
    assert moved(value(model, "y"), value(model, "x"), numbers()).shape == (2, 3, 4)
    assert moved(value(model, "y"), value(model, "x"), numbers(batch=1)) is None


JOINS = {
    "of its parts": (MOVES["roll"], "y"),
    "read besides": (f"{MOVES['roll']}  w = Neg (x)", None),
    "a part is read besides": (f"{MOVES['roll']}  w = Neg (a)", None),
    "with another": ("a = Slice(x, zero, one, one)  c = Neg (at)  y = Concat <axis = 1> (a, other)", None),
    "added": ("a = Slice(x, zero, one, one)  b = Slice(x, one, two, one)  y = Add (a, b)", None),
}


@pytest.mark.parametrize("name", JOINS)
def test_parts_that_are_joined_again_and_read_by_nothing_else(name):
    body, joined = JOINS[name]
    model = graph(f"{body}  z = Neg (y)", ", float[2, 1, 3] other = {0, 0, 0, 0, 0, 0}")
    assert joined_again(value(model, "x")) is (None if joined is None else value(model, joined))
