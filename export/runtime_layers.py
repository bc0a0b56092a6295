"""Walk the layers of one graph in two runtimes: node by node as it is written, and as a runtime computes them.

A layer here is what lies between two tensors that are rounded: its quantizers, its operator and what is fused with it,
so that the runtime computes it in its integer kernels.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from deploykit.arrays import Array
from deploykit.backends.backend import resolve
from deploykit.backends.table import engine_names, load_backend
from deploykit.errors import DeployKitError, ExportError, SpecError, plain_reason
from deploykit.export.graphs import part_giving
from deploykit.export.layer_walk import RunPart, Walk, computed, decibels_between, typed
from deploykit.export.layers import LayerReport, layer_errors
from deploykit.onnx_session import Arrays, graph_batch, values_of

SAME_KERNELS_DB = 30.0
"""Layers of one graph in two runtimes: a sum near the middle of two integers may be rounded to either."""


def compare_in_runtime(
    model: ir.Model,
    images: Array,
    runtime: str,
    *,
    min_own_db: float = SAME_KERNELS_DB,
    modules: Mapping[str, str] | None = None,
    reproducer: Path | None = None,
) -> LayerReport:
    """Compare what a runtime makes of each layer of a graph with what the graph says, node by node.

    Args:
        model: the graph, with or without quantizers.
        images: as it takes them; as many as one call takes are used.
        runtime: its name; one that reads parts of ONNX graphs.
        min_own_db: what every layer's own error must reach.
        modules: path in torch by node, from a quantization plan.
        reproducer: where to write a culprit alone, ``.onnx``, with its inputs and what it should give beside it.

    Raises:
        SpecError: the runtime reads no parts of ONNX graphs.
        ExportError: it refuses one.
    """
    start = time.perf_counter()
    run, model = _runner(runtime), typed(model)
    names = cuts(model)
    batch = np.ascontiguousarray(images[np.arange(graph_batch(model)) % len(images)])
    whole = dict(zip(names, run(part_giving(model, names), {str(model.graph.inputs[0].name): batch}), strict=True))
    expected = values_of(model, names, batch)
    walk = Walk(model, model, names, batch, run)
    report = LayerReport(
        reference=f"the same graph node by node; own and whole are {runtime}'s",
        images=len(batch),
        min_own_db=min_own_db,
        layers=tuple(
            replace(layer, whole_db=decibels_between(expected[layer.tensor], whole[layer.tensor]))
            for layer in layer_errors(model, walk, names, modules or {})
        ),
        seconds=round(time.perf_counter() - start, 2),
    )
    if reproducer is not None and report.culprit is not None:
        walk.reproduce(report.culprit.tensor, reproducer)
    return report


def cuts(model: ir.Model) -> list[str]:
    """Return the tensors that quantizers read, and the outputs; without quantizers, all that are computed."""
    values = computed(model)
    if not any(node.op_type == "QuantizeLinear" for node in model.graph):
        return [str(value.name) for value in values]
    return [
        str(value.name)
        for value in values
        if value.is_graph_output() or any(node.op_type == "QuantizeLinear" for node in value.consumers())
    ]


def _runner(runtime: str) -> RunPart:
    """Return what runs parts of graphs in a runtime, whose errors say that it refused one."""
    known = [name for name in engine_names() if load_backend(name).run_part is not None]
    if runtime not in known:
        raise SpecError(
            f"{runtime} reads no parts of ONNX graphs, so its layers cannot be told. Give {', '.join(known)}."
        )
    run: RunPart = resolve(str(load_backend(runtime).run_part))

    def told(part: ir.Model, feeds: Arrays) -> list[Array]:
        try:
            return run(part, feeds)
        except DeployKitError:
            raise
        except Exception as error:  # runtimes raise classes of their own
            raise ExportError(
                f"{runtime} refuses a part of the graph ({plain_reason(error)}). Fix: export the backbone for "
                f"{runtime}, whose own dialect it reads."
            ) from error

    return told
