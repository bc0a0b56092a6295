from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from deploykit.onnx_session import batches_of, graph_batch, onnx_session, values_of

IMAGES = np.random.default_rng(0).normal(size=(3, 2, 4, 4)).astype(np.float32)


def model_of(batch: int | str) -> ir.Model:
    """``maps = relu(images * 2 + 1)`` of one batch."""
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, 2, 4, 4]) for name in ("images", "maps")]
    constants = [helper.make_tensor(name, TensorProto.FLOAT, [], [value]) for name, value in (("two", 2), ("one", 1))]
    nodes = [
        helper.make_node("Mul", ["images", "two"], ["doubled"]),
        helper.make_node("Add", ["doubled", "one"], ["added"]),
        helper.make_node("Relu", ["added"], ["maps"]),
    ]
    graph = helper.make_graph(nodes, "graph", info[:1], info[1:], constants)
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10))


@pytest.mark.parametrize(("batch", "size"), [(1, 1), (3, 3), ("batch", 4)])
def test_a_batch_is_the_graphs_own_or_four(batch, size):
    assert graph_batch(model_of(batch)) == size


@pytest.mark.parametrize("optimize", [False, True])
def test_a_session_runs_the_graph_as_it_is(optimize):
    session = onnx_session(model_of("batch"), optimize=optimize)
    (found,) = session.run(None, {"images": IMAGES})
    np.testing.assert_allclose(found, np.maximum(2 * IMAGES + 1, 0), rtol=1e-6)
    np.testing.assert_array_equal(session.run(["maps"], {"images": IMAGES})[0], found)


def test_a_repeated_call_writes_over_arrays_of_its_shapes_and_gives_what_a_call_gives():
    session = onnx_session(model_of("batch"))
    call, kept = session.repeated(["maps"]), {}
    for images in (IMAGES, 2 * IMAGES, IMAGES[:1], IMAGES[:, :, ::-1], IMAGES[2:]):
        (found,) = call({"images": images})
        np.testing.assert_array_equal(found, session.run(["maps"], {"images": np.ascontiguousarray(images)})[0])
        assert (kept.get(len(images)) is found) == (kept.get("last") == len(images))
        kept |= {len(images): found, "last": len(images)}


@pytest.mark.parametrize(
    ("size", "count", "rows"), [(1, 2, [[0], [1]]), (2, 4, [[0, 1], [2, 0]]), (4, 2, [[0, 1, 2, 0]])]
)
def test_images_are_repeated_to_whole_batches(size, count, rows):
    found = batches_of(IMAGES, size, count)
    assert len(found) == len(rows)
    for batch, chosen in zip(found, rows, strict=True):
        np.testing.assert_array_equal(batch, IMAGES[chosen])


@pytest.mark.parametrize(("size", "count"), [(3, 4), (4, 10), (7, 10), (12, 10)])
def test_no_image_is_left_out_where_the_batch_does_not_divide_their_number(size, count):
    found = batches_of(np.arange(10), size, count)
    assert {len(batch) for batch in found} == {size}
    assert set(np.concatenate(found)) >= set(range(count))


def test_inner_tensors_are_computed_and_the_graph_stays():
    model = model_of(1)
    found = values_of(model, ["images", "added"], IMAGES)
    assert list(found) == ["images", "added"]
    np.testing.assert_array_equal(found["images"], IMAGES[:1])
    np.testing.assert_allclose(found["added"], 2 * IMAGES[:1] + 1, rtol=1e-6)
    assert [value.name for value in model.graph.outputs] == ["maps"]
