"""Six dimensions and more as five in ONNX graphs: the same numbers, whatever moves between."""

from __future__ import annotations

import random

import numpy as np
import onnx_ir as ir
import pytest

from deploykit.fusion.fold_dimensions import MOST_DIMENSIONS
from deploykit.fusion.onnx_fold_dimensions import fold_onnx_dimensions
from deploykit.onnx_session import onnx_session
from tests.calibration.networks import Windows, master_graph
from tests.fusion.graphs import DYNAMIC, SPEC
from tests.fusion.onnx_graphs import counts, graph_of, is_left_alone, rewritten

SIDES = (SPEC.channels // 2, 2, SPEC.height // 3, 3, SPEC.width // 3, 3)
"""An image, with each of its three dimensions as two."""


def most_dimensions(model: ir.Model) -> int:
    return max(len(value.shape) for node in model.graph for value in node.outputs)


@pytest.fixture(scope="module")
def windows() -> tuple[ir.Model, np.ndarray]:
    """Attention in plain and shifted windows, and an image for it."""
    images = np.random.default_rng(0).standard_normal((1, 3, 64, 64)).astype(np.float32)
    return master_graph(Windows(), Windows.outputs, images).model, images


def test_windows_and_heads_become_five_dimensions_to_the_bit(windows):
    before, images = windows
    after = before.clone()
    assert most_dimensions(before) == 7
    assert fold_onnx_dimensions(after) == 6
    assert most_dimensions(after) <= MOST_DIMENSIONS
    expected, found = (onnx_session(model).run(None, {"images": images}) for model in (before, after))
    assert all(map(np.array_equal, expected, found))


def test_what_nodes_write_keeps_its_name(windows):
    """A plan and the graph's outputs know tensors by their names."""
    before, after = windows[0], windows[0].clone()
    fold_onnx_dimensions(after)
    names = {value.name for node in after.graph for value in node.outputs}
    assert {value.name for node in before.graph for value in node.outputs if len(value.shape) <= 5} <= names


@pytest.mark.parametrize("order", random.Random(0).sample(range(720), 8))
def test_any_permutation_of_six_dimensions_is_exact(order):
    def network(_, x):
        parts = x.reshape(1, *SIDES).permute(0, *permuted)
        return parts.reshape(1, -1), parts.reshape(-1, 6) * 2

    dimensions, permuted = list(range(1, 7)), []
    for base in range(6, 0, -1):
        order, place = divmod(order, base)
        permuted.append(dimensions.pop(place))
    written, after = rewritten(fold_onnx_dimensions, graph_of(network, SPEC, ("one", "two")))
    assert written == (permuted != sorted(permuted))
    assert most_dimensions(after) <= MOST_DIMENSIONS


def test_splits_of_unequal_parts_are_cut_as_three_dimensions():
    def network(_, x):
        first, second = x.reshape(1, *SIDES).split([1, SIDES[2] - 1], 3)
        return first.reshape(1, -1), second.reshape(1, -1)

    written, after = rewritten(fold_onnx_dimensions, graph_of(network, SPEC, ("one", "two")))
    assert (written, most_dimensions(after)) == (1, 3 if "Split" in counts(after) else 5)


def test_what_computes_on_six_dimensions_is_left_to_be_named():
    def network(_, x):
        parts = x.reshape(1, *SIDES).transpose(2, 5)
        return (parts.softmax(-1).transpose(1, 4).reshape(1, -1), parts.reshape(1, -1))

    written, after = rewritten(fold_onnx_dimensions, graph_of(network, SPEC, ("one", "two")))
    assert written == 1
    (softmax,) = (node for node in after.graph if node.op_type == "Softmax")
    assert softmax.inputs[0].producer().op_type == "Transpose"


def test_a_level_of_six_dimensions_stays_one():
    before = graph_of(lambda _, x: x.reshape(1, *SIDES).transpose(2, 5), SPEC)
    rewritten(fold_onnx_dimensions, before)


@pytest.mark.parametrize(
    ("network", "spec"),
    [
        (lambda _, x: x.reshape(x.shape[0], *SIDES).transpose(2, 5).reshape(x.shape[0], -1), DYNAMIC),
        (lambda _, x: x.transpose(1, 3).flatten(1), SPEC),
    ],
    ids=["a dynamic batch", "four dimensions"],
)
def test_other_graphs_are_left_alone(network, spec):
    assert is_left_alone(fold_onnx_dimensions, graph_of(network, spec))


def test_a_squeezed_dimension_is_no_reason_to_stop():
    def network(_, x):
        return x.reshape(1, *SIDES).transpose(2, 5).unsqueeze(3).transpose(3, 4).squeeze(4).reshape(1, -1)

    written, after = rewritten(fold_onnx_dimensions, graph_of(network, SPEC))
    assert written >= 1
    assert most_dimensions(after) <= MOST_DIMENSIONS
