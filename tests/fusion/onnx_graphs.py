"""Small networks as ONNX graphs, and what the tests of passes over these ask of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import onnx
import onnx_ir as ir
from hypothesis import settings

from deploykit.export.to_onnx import to_onnx
from deploykit.fusion.onnx_passes import OnnxPass, run_onnx_passes
from deploykit.fusion.pipeline import EXACT_DB
from deploykit.fusion.program import export_program
from deploykit.spec import InputSpec
from tests.fusion.graphs import DYNAMIC, Calls, images
from tests.tiers import examples

fewer = settings(max_examples=examples(4, whole=6), deadline=None)
"""Each example goes through torch's ONNX exporter, which takes a second."""


def graph_of(function, spec: InputSpec = DYNAMIC, outputs=("logits",), **parts) -> ir.Model:
    """The graph of a network from a function of (itself, images); keyword arguments become its attributes."""
    return to_onnx(export_program(Calls(function, **parts).eval(), spec), spec, outputs)


def rewritten(rewrite: Callable[[ir.Model], int], before: ir.Model) -> tuple[int, ir.Model]:
    """How often a pass that promises exactness applied to a graph, and the graph after it, compared on images."""
    first = before.graph.inputs[0].shape[0]
    batch = first if isinstance(first, int) else 2
    step = OnnxPass(name="it", rewrite=rewrite, min_sqnr_db=EXACT_DB)
    after, (record,) = run_onnx_passes(before, images(count=batch).numpy(), (step,))
    onnx.checker.check_model(ir.to_proto(after))
    given, made = (ir.to_proto(model).graph.output for model in (before, after))
    assert [value.type for value in given] == [value.type for value in made]
    return record.rewrites, after


def is_left_alone(rewrite: Callable[[ir.Model], int], before: ir.Model) -> bool:
    """Whether a pass counts nothing and changes nothing."""
    whole = before.clone()
    expected = ir.to_proto(whole).SerializeToString(deterministic=True)
    return rewrite(whole) == 0 and ir.to_proto(whole).SerializeToString(deterministic=True) == expected


def counts(model: ir.Model) -> Counter[str]:
    """How many nodes of each operator are in a graph."""
    return Counter(node.op_type for node in model.graph)
