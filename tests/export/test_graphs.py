from __future__ import annotations

import numpy as np
import onnx
import torch

from deploykit.calibration.plan import onnx_session
from deploykit.export.graphs import output_specs, select
from deploykit.fusion.program import export_program
from deploykit.graph import Graph
from deploykit.spec import InputSpec, TensorSpec
from tests.conftest_graphs import photographs, reference, tiny_graph


def test_all_outputs_in_order_are_the_graph_itself():
    assert select(tiny_graph(), ["stem", "stage1"]) is tiny_graph()


def test_one_output_is_given_in_both_forms_without_the_nodes_of_the_others():
    part = select(tiny_graph(dynamic=False), ["stem"])
    onnx.checker.check_model(part.model, full_check=True)
    assert len(part.model.graph.node) < len(tiny_graph(dynamic=False).model.graph.node)
    assert [output.name for output in part.outputs] == ["stem"]
    images = photographs(1)
    expected = reference(images)[0]
    (found,) = onnx_session(part.model).run(None, {"images": images})
    with torch.no_grad():
        (in_torch,) = part.program.module()(torch.from_numpy(images))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(in_torch, expected, atol=1e-5)


def test_outputs_come_in_the_order_asked_for():
    part = select(tiny_graph(dynamic=False), ["stage1", "stem"])
    assert [value.name for value in part.model.graph.output] == ["stage1", "stem"]
    assert [output.name for output in part.outputs] == ["stage1", "stem"]
    images = photographs(1)
    found = onnx_session(part.model).run(None, {"images": images})
    for one, other in zip(found, reference(images)[::-1], strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_a_program_has_no_attention_that_no_output_reads():
    attend = torch.nn.functional.scaled_dot_product_attention

    class Levels(torch.nn.Module):
        def forward(self, images):
            level = attend(images, images.relu(), images)
            return level, attend(level, level.relu(), level)

    spec = InputSpec(height=8, width=8)
    outputs = tuple(TensorSpec(name=name, shape=spec.shape) for name in ("one", "two"))
    part = select(Graph(input=spec, outputs=outputs, program=export_program(Levels(), spec)), ["one"])
    names = [str(node.target) for node in part.program.graph.nodes]
    assert sum("attention" in name for name in names) == 1
    images = torch.randn(1, 3, 8, 8)
    torch.testing.assert_close(part.program.module()(images)[0], Levels()(images)[0])


def test_a_form_that_is_absent_stays_absent():
    graph = tiny_graph()
    part = select(Graph(input=graph.input, outputs=graph.outputs, model=graph.model), ["stem"])
    assert part.program is None
    assert part.model is not None


def test_output_specs_say_name_and_shape_with_the_batch():
    assert output_specs(tiny_graph().model) == (
        TensorSpec(name="stem", shape=("batch", 8, 16, 16)),
        TensorSpec(name="stage1", shape=("batch", 16, 8, 8)),
    )
    assert output_specs(tiny_graph(dynamic=False).model)[0].shape == (1, 8, 16, 16)


def test_selecting_twice_gives_equal_bytes():
    graph = tiny_graph(dynamic=False)
    one, other = (select(graph, ["stage1"]).model.SerializeToString(deterministic=True) for _ in range(2))
    assert one == other
