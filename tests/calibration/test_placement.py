from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import nn

from deploykit.backends.onnxruntime import passes as onnxruntime
from deploykit.backends.openvino import passes as openvino
from deploykit.backends.tensorrt import passes as tensorrt
from deploykit.calibration.placement import place, without
from deploykit.errors import CalibrationError
from deploykit.export.graphs import output_specs
from deploykit.graph import OnnxGraph
from deploykit.onnx_session import onnx_session
from deploykit.parity.metrics import sqnr_db
from deploykit.spec import InputSpec
from tests.calibration.networks import master_graph, plan_of, written

IMAGES = np.random.default_rng(0).normal(size=(2, 3, 32, 32)).astype(np.float32)


def nodes_by_output(model):
    return {value.name: node for node in model.graph for value in node.outputs}


def names_of(values) -> list[str]:
    return [str(value.name) for value in values]


def test_every_convolution_and_matrix_product_has_a_weight_and_a_reason_or_a_place(residual):
    placement = place(residual.graph.model)
    weighted = [node for node in residual.graph.model.graph if node.op_type in ("Conv", "Gemm", "MatMul")]
    assert placement.weights.keys() | placement.float_nodes.keys() == {node.name for node in weighted}
    for use in placement.weights.values():
        assert use.input in placement.reads
        assert use.axis == 0
        assert use.bias


def test_squeeze_and_excitation_runs_in_integers_and_is_marked(residual):
    placement = place(residual.graph.model)
    assert not placement.float_nodes
    marked = [use.weight for use in placement.weights.values() if use.pointlike]
    assert [weight.partition(".")[0] for weight in marked] == ["squeeze", "excite"]


def test_an_add_of_gated_maps_stands_between_integer_kernels():
    class Stem(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)

        def forward(self, images):
            maps = nn.functional.hardswish(self.first(images))
            around = nn.functional.max_pool2d(maps, 3, 1, 1)  # else both summands were one convolution
            return (self.last(maps + self.second(around)),)

    placement = place(master_graph(Stem(), ("maps",), IMAGES).model)
    assert len(placement.between) == 2
    assert not set(placement.between) & set(placement.writes)


def test_residual_adds_run_in_integers_up_to_their_relu(residual):
    placement = place(residual.graph.model)
    writers = nodes_by_output(residual.graph.model)
    adds = [node for node in residual.graph.model.graph if node.op_type == "Add"]
    assert len(adds) == 2
    for add in adds:
        assert set(names_of(add.inputs)) <= set(placement.reads)
        assert add.outputs[0].name not in placement.writes
    after = [name for name in placement.writes if writers[name].op_type == "Relu"]
    assert [name for name in after if writers[name].inputs[0].producer().op_type == "Add"] == ["stage1", *after[-3:-2]]


def test_an_add_with_a_float_operand_stays_in_float():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3)

        def forward(self, images):
            return (self.one(images) + self.two(images).sigmoid(),)

    graph = master_graph(Scaled(), ("maps",), IMAGES)
    assert "maps" not in place(graph.model).writes


def test_a_max_pool_shares_the_range_of_its_input(residual):
    placement = place(residual.graph.model)
    ((pooled, source),) = placement.same_range.items()
    writers = nodes_by_output(residual.graph.model)
    assert writers[pooled].op_type == "MaxPool"
    assert names_of(writers[pooled].inputs) == [source]
    assert pooled in placement.writes
    assert pooled not in placement.tensors
    assert source in placement.tensors
    assert residual.plan.range_of(pooled) is residual.plan.ranges[source]


class Pooled(nn.Module):
    """Max-poolings in a row, as behind the stem of GoogLeNet and in the SPPF of a detector, with a reader of each."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.readers = nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(3))

    def forward(self, images):
        maps = [self.first(images).relu()]
        for _ in range(3):
            maps.append(nn.functional.max_pool2d(maps[-1], 3, 1, 1))
        return (torch.cat([reader(each) for reader, each in zip(self.readers, maps[1:], strict=True)], 1),)


@pytest.mark.parametrize("runtime", [onnxruntime, openvino, tensorrt])
def test_max_pools_in_a_row_share_the_range_of_the_first_ones_input(runtime):
    graph = master_graph(Pooled(), ("maps",), IMAGES)
    plan = plan_of(graph, IMAGES)
    assert len(plan.placement.same_range) == 3
    (source,) = set(plan.placement.same_range.values())
    assert source in plan.ranges
    session = onnx_session(written(runtime.DIALECT, graph, plan))
    (expected,) = onnx_session(graph.model).run(None, {"images": IMAGES[:1]})
    (found,) = session.run(None, {"images": IMAGES[:1]})
    assert sqnr_db(expected, found) > 30


def test_both_readers_of_a_shared_weight_run_in_integers():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.shared = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, images):
            once = self.shared(self.stem(images).relu())
            return (self.shared(once.relu()),)

    placement = place(master_graph(Twice(), ("maps",), IMAGES).model)
    assert len(placement.weights) == 3
    assert len({use.weight for use in placement.weights.values()}) == 2
    assert not placement.float_nodes


def test_matrix_products_are_found_with_their_bias_and_batched_ones_stay_in_float():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(32, 12)
            self.batched = nn.Parameter(torch.randn(3, 12, 4))

        def forward(self, images):
            return (self.linear(images) @ self.batched,)

    graph = master_graph(Tokens(), ("tokens",), IMAGES)
    placement = place(graph.model)
    (use,) = placement.weights.values()
    assert use.axis == 1
    assert use.bias in graph.model.graph.initializers
    assert list(placement.float_nodes.values()) == ["its weight has rank 3, and integer kernels take matrices"]
    assert not placement.writes


def test_without_nothing_is_the_same_placement(residual):
    placement = place(residual.graph.model)
    assert without(residual.graph.model, placement, {}) == placement


def test_a_node_taken_out_takes_its_tensors_and_the_add_behind_it_along(residual):
    model, placement = residual.graph.model, place(residual.graph.model)
    writers = nodes_by_output(model)
    add = next(node for node in model.graph if node.op_type == "Add")
    conv = next(writers[name] for name in names_of(add.inputs) if writers[name].op_type == "Conv")
    found = without(model, placement, {conv.name: "because"})
    assert found.float_nodes == placement.float_nodes | {conv.name: "because"}
    assert found.weights.keys() == placement.weights.keys() - {conv.name}
    assert conv.outputs[0].name in placement.writes
    assert conv.outputs[0].name not in found.writes
    summed = next(reader.outputs[0].name for reader in add.outputs[0].consumers())
    assert summed in placement.writes
    assert summed not in found.writes
    assert set(found.tensors) < set(placement.tensors)


def test_without_the_stem_the_images_are_not_rounded(residual):
    placement = place(residual.graph.model)
    stem = next(iter(placement.weights))
    assert "images" in placement.reads
    assert "images" not in without(residual.graph.model, placement, {stem: "because"}).tensors


def test_a_plan_without_nodes_renders_and_leaves_them_in_float(residual):
    nodes = list(residual.plan.placement.weights)[:3]
    plan = residual.plan.without(residual.graph.model, dict.fromkeys(nodes, "because"))
    model = written(onnxruntime.DIALECT, residual.graph, plan)
    kept = {node.name for node in model.graph if len(node.inputs) > 1 and node.inputs[1].is_initializer()}
    assert set(nodes) <= kept
    assert not kept & (residual.plan.placement.weights.keys() - set(nodes))
    residual.run(model)


def test_a_node_that_is_not_in_integers_cannot_be_taken_out(residual):
    placement = place(residual.graph.model)
    with pytest.raises(CalibrationError, match="nowhere: no node"):
        without(residual.graph.model, placement, {"nowhere": "because"})


def test_a_float_convolution_between_integers_stays_in_float_in_onnx_runtime(residual):
    """ONNX Runtime would quantize it, with one scale for its whole weight."""
    conv = next(
        name for name, use in residual.plan.placement.weights.items() if use.input in residual.plan.placement.writes
    )
    plan = residual.plan.without(residual.graph.model, {conv: "because"})
    model = written(onnxruntime.DIALECT, residual.graph, plan)
    session = onnx_session(model, optimize=False)
    as_written = [session.run(None, {"images": image[None]}) for image in residual.images]
    expected = [np.concatenate(parts) for parts in zip(*as_written, strict=True)]
    assert min(sqnr_db(one, other) for one, other in zip(expected, residual.run(model), strict=True)) > 60


CONSTANT_OPERANDS = {
    "a convolution of a constant": """
        conv = Conv <kernel_shape = [1, 1]> (images, kernel)
        fixed = Conv <kernel_shape = [1, 1]> (map, kernel)
        maps = Add (conv, fixed)
    """,
    "a product of two constants": """
        conv = Conv <kernel_shape = [1, 1]> (images, kernel)
        fixed = MatMul (map, square)
        maps = Add (conv, fixed)
    """,
    "a product of an expanded constant": """
        conv = Conv <kernel_shape = [1, 1]> (images, kernel)
        sizes = Shape (conv)
        wide = Expand (map, sizes)
        fixed = MatMul (wide, square)
        maps = Add (conv, fixed)
    """,
    "a table that is gathered": """
        conv = Conv <kernel_shape = [1, 1]> (images, kernel)
        order = Constant <value_ints = [3, 2, 1, 0]> ()
        rows = Gather <axis = 2> (map, order)
        fixed = MatMul (rows, square)
        maps = MatMul (conv, square)
        sum = Add (maps, fixed)
        last = Identity (sum)
    """,
    "a constant on the left": """
        conv = Conv <kernel_shape = [1, 1]> (images, kernel)
        mixed = MatMul (square, conv)
        maps = MatMul (mixed, square)
    """,
    "a bias that is computed": """
        conv = Conv <kernel_shape = [1, 1]> (images, kernel)
        axes = Constant <value_ints = [0, 2, 3]> ()
        total = ReduceSum <keepdims = 0> (conv, axes)
        maps = Conv <kernel_shape = [1, 1]> (conv, kernel, total)
    """,
}


@pytest.mark.parametrize("body", CONSTANT_OPERANDS.values(), ids=CONSTANT_OPERANDS)
@pytest.mark.parametrize("dialect", [onnxruntime.DIALECT, openvino.DIALECT, tensorrt.DIALECT], ids=["ort", "ov", "trt"])
def test_constants_are_operands_and_need_no_range(body, dialect):
    graph = graph_from_text(body)
    constants = set(graph.model.graph.initializers)
    placement = place(graph.model)
    assert placement.weights
    assert not constants & set(placement.tensors)
    plan = plan_of(graph, np.random.default_rng(1).normal(size=(8, 4, 4, 4)).astype(np.float32))
    images = np.random.default_rng(2).normal(size=(1, 4, 4, 4)).astype(np.float32)
    (expected,) = onnx_session(graph.model).run(None, {"images": images})
    (found,) = onnx_session(written(dialect, graph, plan)).run(None, {"images": images})
    assert sqnr_db(expected, found) > 20


def graph_from_text(body: str) -> OnnxGraph:
    """A graph of the images ``(1, 4, 4, 4)`` to what the last line of ``body`` gives, with its constants."""
    lines = [line.strip() for line in body.strip().splitlines()]
    output = lines[-1].partition(" ")[0]
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 21]>\n'
        f"backbone (float[1,4,4,4] images) => (float[1,4,4,4] {output}) {{\n" + "\n".join(lines) + "\n}"
    )
    generator = np.random.default_rng(0)
    shapes = {"kernel": (4, 4, 1, 1), "map": (1, 4, 4, 4), "square": (4, 4)}
    used = {name for node in model.graph.node for name in node.input}
    model.graph.initializer.extend(
        onnx.numpy_helper.from_array(generator.normal(size=shape).astype(np.float32), name)
        for name, shape in shapes.items()
        if name in used
    )
    for position, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}_{position}"
    inferred = ir.from_proto(onnx.shape_inference.infer_shapes(model))
    spec = InputSpec(channels=4, height=4, width=4)
    return OnnxGraph(input=spec, outputs=output_specs(inferred), model=inferred)
