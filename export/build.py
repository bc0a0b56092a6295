"""From a plan to an engine file: the part of an export that a search repeats for each candidate."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from deploykit.calibration.precision import PrecisionPlan
from deploykit.export.graphs import select
from deploykit.export.lowering import Engine, Lowering
from deploykit.fusion.embed_preprocessing import embed_preprocessing
from deploykit.fusion.onnx_passes import SpecializedGraph, specialize
from deploykit.fusion.pipeline import FusionRecord
from deploykit.graph import Graph
from deploykit.runtimes.base import FloatArray
from deploykit.spec import InputSpec


class Dialect(Protocol):
    """Write a plan into a graph in the form that one runtime fuses."""

    def __call__(self, master: Graph, plan: PrecisionPlan) -> Graph:
        """A new graph; the master stays as it is."""
        ...


@dataclass(frozen=True, kw_only=True)
class Built:
    """An engine file, the graph it was lowered from, and that graph with every level as an output."""

    engine: Engine
    graph: Graph
    whole: Graph
    records: tuple[FusionRecord, ...]


@dataclass(frozen=True, kw_only=True)
class Builder:
    """Makes engines of one network for one runtime.

    ``outputs`` are what an engine gives, ``taken`` is its input, and ``probe`` ``(N, C, H, W)`` are
    the images that graph passes are compared on.
    """

    master: Graph
    runtime: str
    render: Dialect
    lower: Lowering
    outputs: tuple[str, ...]
    taken: InputSpec
    probe: FloatArray
    target: str | None

    def rendered(self, plan: PrecisionPlan) -> SpecializedGraph:
        """The master graph in the precision of a plan, in the form that the runtime fuses."""
        return specialize(self.render(self.master, plan), self.runtime, self.probe)

    def lowered(self, specialized: SpecializedGraph, folder: Path) -> Built:
        """Write the engine of a rendered graph into a folder."""
        graph = embed_preprocessing(select(specialized.graph, self.outputs), self.taken)
        return Built(
            engine=self.lower(graph, folder, target=self.target),
            graph=graph,
            whole=embed_preprocessing(specialized.graph, self.taken),
            records=specialized.records,
        )
