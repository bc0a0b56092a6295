"""Walk two ONNX graphs tensor by tensor: each layer's own error, and what it inherits.

A layer here is what lies between two tensors that both graphs name. Its own error is what it makes of the reference's
inputs; the whole error is what it gives when the whole candidate runs. Both graphs run node by node, as written.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from deploykit.arrays import Array
from deploykit.errors import SpecError
from deploykit.export.float_activations import PRODUCT, constant_of, without_activation_quantizers
from deploykit.export.layer_outputs import wrong_outputs
from deploykit.export.layer_walk import FLOATS, Walk, computed, typed
from deploykit.graph import TRANSPOSED
from deploykit.onnx_session import graph_batch
from deploykit.parity.report import MAX_SQNR_DB

SAME_DB = 60.0
"""Layers of two engines of one precision give the same, but for roundings."""

GROUP = 24
"""Tensors that are looked at together, which bounds the memory."""


@dataclass(frozen=True, kw_only=True)
class LayerError:
    """One layer, in dB: ``own_db`` on the reference's inputs, ``whole_db`` in the whole network.

    ``node`` gives ``tensor``; ``module`` is the path of its weights in torch, where it has any; ``quantizer`` has the
    scale and zero point of what it reads in integers. ``note`` says in words what is wrong with it as an output.
    """

    tensor: str
    node: str
    operator: str
    module: str | None
    own_db: float
    whole_db: float
    quantizer: str | None = None
    note: str | None = None


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """Every layer in the order of the graph.

    ``min_own_db`` is what every layer's own error must reach, None: no gate; ``only_reference`` and ``only_candidate``
    are operators that one graph has more of.
    """

    reference: str
    images: int
    min_own_db: float | None
    layers: tuple[LayerError, ...]
    only_reference: dict[str, int] = field(default_factory=dict)
    only_candidate: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def culprit(self) -> LayerError | None:
        """The first layer outside the gate; without a gate, the one with the largest own error."""
        if self.min_own_db is None:
            return min(self.layers, key=lambda layer: layer.own_db, default=None)
        return next((layer for layer in self.layers if not layer.own_db >= self.min_own_db), None)


def compare_layers(
    candidate: ir.Model,
    images: Array,
    *,
    reference: ir.Model | None = None,
    reference_name: str = "itself without activation quantizers",
    min_own_db: float | None = None,
    modules: Mapping[str, str] | None = None,
    outputs: Sequence[str] = (),
    reproducer: Path | None = None,
) -> LayerReport:
    """Compare a graph with another of the same network, layer by layer.

    Args:
        candidate: the graph that is looked at.
        images: as both take them; as many as one call takes are used.
        reference: the graph that it should be; None: itself, with activations in float.
        reference_name: for people.
        min_own_db: what every layer's own error must reach.
        modules: path in torch by node, from a quantization plan.
        outputs: the outputs that the candidate has to give, by name; one that it lacks, that is not among them or that
            gives what another should is a layer that is wrong. None given: they are not looked at.
        reproducer: where to write the culprit alone, ``.onnx``, with its inputs and what it should give beside it in
            ``.npz``; only where it is outside the gate.

    Raises:
        SpecError: the graphs share no tensor, or there is nothing to leave out.
    """
    start = time.perf_counter()
    candidate, reference = typed(candidate), None if reference is None else typed(reference)
    other = without_activation_quantizers(candidate) if reference is None else reference
    names = shared_tensors(candidate, (str(value.name) for value in computed(other)))
    batch = np.ascontiguousarray(images[np.arange(graph_batch(candidate)) % len(images)])
    walk = Walk(candidate, other, names, batch)
    layers = list(layer_errors(candidate, walk, names, modules or {}))
    if outputs:
        known = [name for name in outputs if name in {str(value.name) for value in other.graph.outputs}]
        layers = with_outputs(layers, candidate, wrong_outputs(candidate, walk, outputs, known), modules or {})
    report = LayerReport(
        reference=reference_name,
        images=len(batch),
        min_own_db=min_own_db,
        layers=tuple(layers),
        only_reference={} if reference is None else _more_of(reference, candidate),
        only_candidate={} if reference is None else _more_of(candidate, reference),
        seconds=round(time.perf_counter() - start, 2),
    )
    reproduce(report, walk, reproducer)
    return report


def reproduce(report: LayerReport, walk: Walk, path: Path | None) -> None:
    """Write the culprit alone, where it is outside the gate by its numbers and not by its name."""
    culprit = report.culprit
    if path is not None and report.min_own_db is not None and culprit is not None and culprit.note is None:
        walk.reproduce(culprit.tensor, path)


def layer_errors(candidate: ir.Model, walk: Walk, names: list[str], modules: Mapping[str, str]) -> Iterator[LayerError]:
    """Yield each layer of a walk, the tensors looked at in groups."""
    producers = {str(value.name): node for node in candidate.graph for value in node.outputs}
    for begin in range(0, len(names), GROUP):
        for name, own_db, whole_db in walk.errors(names[begin : begin + GROUP]):
            yield _layer(name, producers[name], modules, own_db=own_db, whole_db=whole_db)


def with_outputs(
    layers: Iterable[LayerError], candidate: ir.Model, wrong: Mapping[str, str], modules: Mapping[str, str]
) -> list[LayerError]:
    """Return the layers in the graph's order, those that give wrong outputs broken, with the reason as their note."""
    broken = -MAX_SQNR_DB
    found = {layer.tensor: layer for layer in layers}
    producers = {str(value.name): node for node in candidate.graph for value in node.outputs}
    for name, note in wrong.items():
        if name in found:
            found[name] = replace(found[name], own_db=broken, note=note)
        elif name in producers:
            layer = _layer(name, producers[name], modules, own_db=broken, whole_db=broken)
            found[name] = replace(layer, note=note)
        else:
            found[name] = LayerError(
                tensor=name, node="", operator="", module=None, own_db=broken, whole_db=broken, note=note
            )
    places = {name: place for place, name in enumerate(producers)}
    return sorted(found.values(), key=lambda layer: places.get(layer.tensor, -1))


def _layer(name: str, node: ir.Node, modules: Mapping[str, str], *, own_db: float, whole_db: float) -> LayerError:
    return LayerError(
        tensor=name,
        node=str(node.name),
        operator=node.op_type,
        module=modules.get(str(node.name)) or modules.get(str(node.name).partition("/")[0]) or _module_of(node),
        own_db=own_db,
        whole_db=whole_db,
        quantizer=_quantizer_of(node),
    )


def shared_tensors(candidate: ir.Model, theirs: Iterable[str]) -> list[str]:
    """Return the float tensors of a graph that its reference computes too, in the graph's order.

    Those that do not depend on the images in the graph are among them: an answer may be a constant.

    Raises:
        SpecError: there is none.
    """
    known = set(theirs)
    values = (value for node in candidate.graph for value in node.outputs)
    names = [str(value.name) for value in values if value.name in known and value.dtype in FLOATS]
    if not names:
        raise SpecError(
            "the two graphs name no tensor alike, so their layers cannot be told. Fix: give a reference that was "
            "exported from the same backbone for the same runtime."
        )
    return names


def _module_of(node: ir.Node) -> str | None:
    """Return the path in torch of a node's weights, from the name of the constant; None where it has none."""
    for value in node.inputs[1:]:
        name = str(value.name) if value is not None and value.const_value is not None else ""
        name = name.removesuffix(TRANSPOSED)
        if name.endswith((".weight", ".bias")):
            return name.rpartition(".")[0].removeprefix("backbone.")
    return None


def _quantizer_of(node: ir.Node) -> str | None:
    """Return the scale and zero point by which a node's input became integers; None where it is in float."""
    first = _producer(node)
    if first is not None and first.op_type == PRODUCT:
        first = _producer(first)
    if first is not None and first.op_type == "DynamicQuantizeLinear":
        return "a scale for each call"
    source = node if node.op_type == "DequantizeLinear" else first
    if source is None or source.op_type != "DequantizeLinear":
        return None
    scale, zero_point = (constant_of(source, place) for place in (1, 2))
    if scale is None or scale.size != 1:
        return None
    point = "0" if zero_point is None else f"{zero_point.item()} ({zero_point.dtype})"
    return f"scale {float(scale.item()):.4g}, zero point {point}"


def _producer(node: ir.Node) -> ir.Node | None:
    return node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None


def _more_of(one: ir.Model, other: ir.Model) -> dict[str, int]:
    """Count the operators that one graph has more of; quantizers are what the two are known to differ in."""
    counts = [Counter(node.op_type for node in model.graph) for model in (one, other)]
    more = counts[0] - counts[1]
    return {
        name: more[name] for name in sorted(more) if not name.endswith("quantizeLinear") and name != "QuantizeLinear"
    }
