"""Which operator is at fault: in torch's exporter, in a runtime alone, and in a runtime only among others."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from torch import nn

from deploykit.export.culprit import wrong_in_onnx, wrong_in_runtime
from deploykit.export.graphs import output_specs
from deploykit.export.to_onnx import to_onnx
from deploykit.fusion.program import export_program
from deploykit.graph import Master, OnnxGraph, TorchProgram
from deploykit.spec import BatchRange, InputSpec

IMAGES = np.random.default_rng(0).normal(size=(3, 3, 16, 16)).astype(np.float32)


class Network(nn.Module):
    """Two convolutions around ``inner``, and the pooled map."""

    def __init__(self, inner):
        super().__init__()
        self.first, self.inner, self.last = nn.Conv2d(3, 8, 3, 2, 1), inner, nn.Conv2d(8, 8, 3, 2, 1)

    def forward(self, images):
        deep = self.last(self.inner(self.first(images).relu()).relu())
        return deep, deep.mean((2, 3))


def master_of(inner, batch=1) -> Master:
    spec = InputSpec(batch=batch, height=16, width=16)
    program = export_program(Network(inner).eval(), spec)
    model = to_onnx(program, spec, ("relu", "embedding"))  # the first is also a name inside
    outputs = output_specs(model)
    return Master(
        onnx=OnnxGraph(input=spec, outputs=outputs, model=model),
        torch=TorchProgram(input=spec, outputs=outputs, program=program),
    )


@pytest.mark.parametrize("batch", [1, BatchRange()])
def test_a_graph_that_computes_what_torch_does_has_no_wrong_operator(batch):
    assert wrong_in_onnx(master_of(nn.AvgPool2d(2), batch), IMAGES, 80.0) is None


def test_the_operator_that_the_exporter_writes_wrongly_is_named():
    found = wrong_in_onnx(master_of(nn.AvgPool2d(2, divisor_override=3)), IMAGES, 80.0)
    assert found is not None
    assert "exporter writes aten.avg_pool2d at 'inner' (AvgPool2d), test_culprit.py" in found


def refusing(*operators, alone=True):
    """A runtime that refuses operators, in graphs of one node too or only in longer ones."""
    tried = []

    def find_problem(part: ir.Model, inputs, min_sqnr_db):
        nodes = [node.op_type for node in part.graph]
        tried.append(nodes)
        assert set(inputs) == {value.name for value in part.graph.inputs}
        return "it refuses it" if set(operators) & set(nodes) and (alone or len(nodes) > 1) else None

    return find_problem, tried


@pytest.mark.parametrize("batch", [1, BatchRange()])
def test_the_first_operator_that_fails_alone_is_found_and_each_kind_is_tried_once(batch):
    find_problem, tried = refusing("AveragePool")
    node, problem = wrong_in_runtime(master_of(nn.AvgPool2d(2), batch).onnx.model, IMAGES, find_problem, 80.0)
    assert (node.op_type, problem) == ("AveragePool", "it refuses it")
    assert tried == [["Conv"], ["Relu"], ["AveragePool"]]


def test_an_operator_that_fails_only_behind_others_is_found_by_bisection():
    find_problem, tried = refusing("AveragePool", alone=False)
    node, _ = wrong_in_runtime(master_of(nn.AvgPool2d(2)).onnx.model, IMAGES, find_problem, 80.0)
    assert node.op_type == "AveragePool"
    assert max(map(len, tried)) > 3


def test_a_runtime_that_is_right_has_no_wrong_operator():
    find_problem, tried = refusing("Softmax")
    assert wrong_in_runtime(master_of(nn.AvgPool2d(2)).onnx.model, IMAGES, find_problem, 80.0) is None
    assert len(tried[-1]) > 3, "the whole graph is tried last"


def test_sizes_and_constants_stay_inside_a_part():
    parts = []

    def find_problem(part: ir.Model, inputs, min_sqnr_db):
        parts.append((part.graph.node(0).op_type, {name: value.shape for name, value in inputs.items()}))

    resize = nn.Upsample(size=(5, 7), mode="bilinear")
    wrong_in_runtime(master_of(resize).onnx.model, IMAGES, find_problem, 80.0)
    alone = dict(parts[:-1])
    assert list(alone["Resize"].values()) == [(1, 8, 8, 8)]
    assert all(len(inputs) == 1 for inputs in alone.values())
