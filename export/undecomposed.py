"""Spare torch's ONNX exporter a trace of programs whose operators it writes as they are.

Before it writes a program, the exporter traces it anew, to decompose what has no ONNX form: more than half of its time.
Of `KEPT` operators comes out what went in, and what torch makes of the few others that networks call is written by
`respell`, so the exporter is told that the program is decomposed already.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch._ops import OperatorBase
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, OutputSpec, TensorArgument
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from deploykit.fusion.respell import RESPELLED, respell

_aten = torch.ops.aten

KEPT = frozenset(
    (
        operator.getitem,
        _aten.abs.default,
        _aten.add.Tensor,
        _aten.amax.default,
        _aten.avg_pool2d.default,
        _aten.bmm.default,
        _aten.cat.default,
        _aten.clamp.default,
        _aten.conv2d.default,
        _aten.div.Tensor,
        _aten.elu.default,
        _aten.exp.default,
        _aten.gelu.default,
        _aten.group_norm.default,
        _aten.hardsigmoid.default,
        _aten.hardswish.default,
        _aten.hardtanh.default,
        _aten.layer_norm.default,
        _aten.leaky_relu.default,
        _aten.linear.default,
        _aten.matmul.default,
        _aten.max_pool2d.default,
        _aten.mean.dim,
        _aten.mul.Tensor,
        _aten.neg.default,
        _aten.pad.default,
        _aten.permute.default,
        _aten.prelu.default,
        _aten.relu.default,
        _aten.relu6.default,
        _aten.scaled_dot_product_attention.default,
        _aten.select.int,
        _aten.sigmoid.default,
        _aten.silu.default,
        _aten.slice.Tensor,
        _aten.softmax.int,
        _aten.softplus.default,
        _aten.split.Tensor,
        _aten.split_with_sizes.default,
        _aten.sqrt.default,
        _aten.sub.Tensor,
        _aten.tanh.default,
        _aten.transpose.int,
        _aten.unsqueeze.default,
        _aten.upsample_bilinear2d.vec,
        _aten.upsample_nearest2d.vec,
    )
)
"""Operators that come out of the decompositions as they go in, whatever their settings are."""


class _Undecomposed(ExportedProgram):
    """A program that is decomposed already."""

    def run_decompositions(
        self,
        decomp_table: dict[OperatorBase, Callable[..., Any]] | None = None,
        decompose_custom_triton_ops: bool = False,
    ) -> ExportedProgram:
        return self


def undecomposed(program: ExportedProgram) -> ExportedProgram:
    """Return a copy of a program that torch's exporter writes as it is, or the same program where it must not.

    What computes with a dynamic size is traced anew, which writes the computation out. Where none is an argument, the
    graph is the same but for the numbers in the names of tensors, which count such computations.
    """
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    if not all(node.target in KEPT or node.target in RESPELLED for node in calls):
        return program
    graph, names = respell(program.graph)  # a copy, into which the exporter writes
    if any(_reads_symbol(node) for node in graph.nodes):
        return program
    signature = program.graph_signature
    return _Undecomposed(
        root=program.graph_module,
        graph=graph,
        graph_signature=ExportGraphSignature(
            list(signature.input_specs), [_renamed(output, names) for output in signature.output_specs]
        ),
        state_dict=program.state_dict,
        range_constraints=program.range_constraints,
        module_call_graph=program.module_call_graph,
        example_inputs=program.example_inputs,
        constants=program.constants,
        verifiers=program.verifiers,
    )


def _reads_symbol(node: Node) -> bool:
    """Whether an argument of a call is a dynamic size."""
    return any(isinstance(value, torch.SymInt) for value in tree_leaves((node.args, node.kwargs)))


def _renamed(output: OutputSpec, names: dict[str, str]) -> OutputSpec:
    name = output.arg.name
    return replace(output, arg=TensorArgument(name=names.get(name, name)))
