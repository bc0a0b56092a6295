"""ONNX graphs evaluated on the CPU: to calibrate, to prove passes, and to compare."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeAlias

import numpy as np

from deploykit.arrays import Array, FloatArray
from deploykit.backends.backend import resolve
from deploykit.backends.table import GRAPH_SESSION

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import onnx_ir as ir

Arrays: TypeAlias = dict[str, Array]


class GraphSession(Protocol):
    """An opened graph."""

    def run(self, outputs: Sequence[str] | None, feeds: Mapping[str, Array]) -> list[Array]:
        """Compute outputs by name (None: all) from inputs by name."""
        ...

    def run_path(self, outputs: Sequence[str], feeds: Mapping[str, Array]) -> list[Array]:
        """Compute outputs, and nothing that they do not need."""
        ...

    def repeated(self, outputs: Sequence[str]) -> Callable[[Mapping[str, Array]], list[Array]]:
        """Return a call that computes outputs from inputs by name; where shapes are equal, into the same arrays."""
        ...


def onnx_session(model: ir.Model, *, optimize: bool = True) -> GraphSession:
    """Open a graph to measure with; unoptimized, each node runs as it is written.

    Raises:
        MissingDependency: the package that evaluates graphs is not installed.
    """
    session: GraphSession = resolve(GRAPH_SESSION)(model, optimize=optimize)
    return session


def graph_batch(model: ir.Model) -> int:
    """Return how many images one call takes: the graph's own batch, or 4 when it is dynamic."""
    shape = model.graph.inputs[0].shape
    first = shape[0] if shape is not None else None
    return first if isinstance(first, int) and first > 0 else 4


def batches_of(images: FloatArray, size: int, count: int) -> list[FloatArray]:
    """Cut at least ``count`` images, repeated where there are fewer, into whole batches of ``size``."""
    chosen = images[np.arange(-(-count // size) * size) % len(images)]
    return [chosen[start : start + size] for start in range(0, len(chosen), size)]


def values_of(whole: ir.Model, names: Sequence[str], images: Array) -> Arrays:
    """Compute any tensors of a graph on images, node by node."""
    source, size = str(whole.graph.inputs[0].name), graph_batch(whole)
    inner = [name for name in names if name != source]
    batch = np.ascontiguousarray(images[np.arange(size) % len(images)])
    copy = whole.clone()
    values = {value.name: value for node in copy.graph for value in node.outputs}
    copy.graph.outputs.clear()
    copy.graph.outputs.extend(values[name] for name in inner)
    found: Arrays = {source: batch} if source in names else {}
    if inner:
        found |= dict(zip(inner, onnx_session(copy, optimize=False).run(inner, {source: batch}), strict=True))
    return found
