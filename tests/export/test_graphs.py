from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import torch

from deploykit.export.graphs import output_specs, select
from deploykit.fusion.program import export_program
from deploykit.graph import TorchProgram
from deploykit.onnx_session import onnx_session
from deploykit.spec import InputSpec, TensorSpec
from tests.conftest_graphs import photographs, reference, tiny_graph, tiny_program


def test_all_outputs_in_order_are_the_graph_itself():
    assert select(tiny_graph(), ["stem", "stage1"]) is tiny_graph()
    assert select(tiny_program(), ["stem", "stage1"]) is tiny_program()


def test_one_output_is_given_in_both_forms_without_the_nodes_of_the_others():
    part, program = (select(form(dynamic=False), ["stem"]) for form in (tiny_graph, tiny_program))
    onnx.checker.check_model(ir.to_proto(part.model), full_check=True)
    assert len(part.model.graph) < len(tiny_graph(dynamic=False).model.graph)
    for form in (part, program):
        assert [output.name for output in form.outputs] == ["stem"]
    images = photographs(1)
    expected = reference(images)[0]
    (found,) = onnx_session(part.model).run(None, {"images": images})
    with torch.no_grad():
        (in_torch,) = program.program.module()(torch.from_numpy(images))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(in_torch, expected, atol=1e-5)


def test_outputs_come_in_the_order_asked_for():
    part = select(tiny_graph(dynamic=False), ["stage1", "stem"])
    assert [value.name for value in part.model.graph.outputs] == ["stage1", "stem"]
    assert [output.name for output in part.outputs] == ["stage1", "stem"]
    images = photographs(1)
    found = onnx_session(part.model).run(None, {"images": images})
    program = select(tiny_program(dynamic=False), ["stage1", "stem"]).program
    with torch.no_grad():
        in_torch = program.module()(torch.from_numpy(images))
    for one, same, other in zip(found, in_torch, reference(images)[::-1], strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
        np.testing.assert_allclose(same, other, atol=1e-5)


def test_a_program_has_no_attention_that_no_output_reads():
    attend = torch.nn.functional.scaled_dot_product_attention

    class Levels(torch.nn.Module):
        def forward(self, images):
            level = attend(images, images.relu(), images)
            return level, attend(level, level.relu(), level)

    spec = InputSpec(height=8, width=8)
    outputs = tuple(TensorSpec(name=name, shape=spec.shape) for name in ("one", "two"))
    part = select(TorchProgram(input=spec, outputs=outputs, program=export_program(Levels(), spec)), ["one"])
    names = [str(node.target) for node in part.program.graph.nodes]
    assert sum("attention" in name for name in names) == 1
    images = torch.randn(1, 3, 8, 8)
    torch.testing.assert_close(part.program.module()(images)[0], Levels()(images)[0])


def test_the_whole_graph_stays_as_it_is():
    before = ir.to_proto(tiny_graph(dynamic=False).model).SerializeToString(deterministic=True)
    select(tiny_graph(dynamic=False), ["stem"])
    assert ir.to_proto(tiny_graph(dynamic=False).model).SerializeToString(deterministic=True) == before


def test_output_specs_say_name_and_shape_with_the_batch():
    assert output_specs(tiny_graph().model) == (
        TensorSpec(name="stem", shape=("batch", 8, 16, 16)),
        TensorSpec(name="stage1", shape=("batch", 16, 8, 8)),
    )
    assert output_specs(tiny_graph(dynamic=False).model)[0].shape == (1, 8, 16, 16)


def test_selecting_twice_gives_equal_bytes():
    graph = tiny_graph(dynamic=False)
    one, other = (ir.to_proto(select(graph, ["stage1"]).model) for _ in range(2))
    assert one.SerializeToString(deterministic=True) == other.SerializeToString(deterministic=True)
