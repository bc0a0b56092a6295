"""Walk two ONNX graphs tensor by tensor: each layer's own error, and what it inherits.

A layer here is what lies between two tensors that both graphs name. Its own error is what it makes of the reference's
inputs; the whole error is what it gives when the whole candidate runs. Both graphs run node by node, as written.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx_ir as ir

from deploykit.arrays import Array
from deploykit.errors import SpecError
from deploykit.export.layer_walk import Walk, computed, typed
from deploykit.onnx_session import graph_batch

SAME_DB = 60.0
"""Layers of two engines of one precision give the same, but for roundings."""

GROUP = 24
"""Tensors that are looked at together, which bounds the memory."""


@dataclass(frozen=True, kw_only=True)
class LayerError:
    """One layer, in dB: ``own_db`` on the reference's inputs, ``whole_db`` in the whole network.

    ``node`` gives ``tensor``; ``module`` is the path of its weights in torch, where it has any; ``quantizer`` has the
    scale and zero point of what it reads in integers.
    """

    tensor: str
    node: str
    operator: str
    module: str | None
    own_db: float
    whole_db: float
    quantizer: str | None = None


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
        reproducer: where to write the culprit alone, ``.onnx``, with its inputs and what it should give beside it in
            ``.npz``; only where it is outside the gate.

    Raises:
        SpecError: the graphs share no tensor, or there is nothing to leave out.
    """
    start = time.perf_counter()
    candidate, reference = typed(candidate), None if reference is None else typed(reference)
    other = without_activation_quantizers(candidate) if reference is None else reference
    names = shared_tensors(candidate, other)
    batch = np.ascontiguousarray(images[np.arange(graph_batch(candidate)) % len(images)])
    walk = Walk(candidate, other, names, batch)
    report = LayerReport(
        reference=reference_name,
        images=len(batch),
        min_own_db=min_own_db,
        layers=tuple(layer_errors(candidate, walk, names, modules or {})),
        only_reference={} if reference is None else _more_of(reference, candidate),
        only_candidate={} if reference is None else _more_of(candidate, reference),
        seconds=round(time.perf_counter() - start, 2),
    )
    if reproducer is not None and report.min_own_db is not None and report.culprit is not None:
        walk.reproduce(report.culprit.tensor, reproducer)
    return report


def layer_errors(candidate: ir.Model, walk: Walk, names: list[str], modules: Mapping[str, str]) -> Iterator[LayerError]:
    """Yield each layer of a walk, the tensors looked at in groups."""
    producers = {str(value.name): node for node in candidate.graph for value in node.outputs}
    for begin in range(0, len(names), GROUP):
        for name, own_db, whole_db in walk.errors(names[begin : begin + GROUP]):
            node = producers[name]
            yield LayerError(
                tensor=name,
                node=str(node.name),
                operator=node.op_type,
                module=modules.get(str(node.name)) or _module_of(node),
                own_db=own_db,
                whole_db=whole_db,
                quantizer=_quantizer_of(node),
            )


def shared_tensors(candidate: ir.Model, reference: ir.Model) -> list[str]:
    """Return the computed tensors that both graphs name, in the candidate's order.

    Raises:
        SpecError: there is none.
    """
    theirs = {str(value.name) for value in computed(reference)}
    names = [str(value.name) for value in computed(candidate) if str(value.name) in theirs]
    if not names:
        raise SpecError(
            "the two graphs name no tensor alike, so their layers cannot be told. Fix: give a reference that was "
            "exported from the same backbone for the same runtime."
        )
    return names


def without_activation_quantizers(model: ir.Model) -> ir.Model:
    """Return a graph whose activations stay in float: what a quantizer cuts off below zero, a Relu does.

    Raises:
        SpecError: it quantizes no activations.
    """
    whole = model.clone()
    outputs = set(whole.graph.outputs)
    bypassed = 0
    for node in list(whole.graph):
        source = (
            node.inputs[0].producer() if node.op_type == "DequantizeLinear" and node.inputs[0] is not None else None
        )
        if source is None or source.op_type != "QuantizeLinear" or node.outputs[0] in outputs:
            continue
        value = source.inputs[0]
        if value is None:
            continue
        if _low_of(source) >= 0:
            relu = ir.node("Relu", [value], name=f"{node.name}/relu")
            whole.graph.insert_before(node, relu)
            value = relu.outputs[0]
            value.name = f"{node.outputs[0].name}/float"
        ir.convenience.replace_all_uses_with(node.outputs[0], value)
        bypassed += 1
    if not bypassed:
        raise SpecError(
            "the engine quantizes no activations, so there is nothing to compare its layers with. Fix: give a "
            "reference: another bundle of the same backbone and runtime, such as the last release's."
        )
    return whole


def _low_of(quantizer: ir.Node) -> float:
    """Return the least value that a quantizer can give; minus infinity where that differs by channel."""
    scale, zero_point = (_constant(quantizer, place) for place in (1, 2))
    if scale is None or scale.size != 1:
        return float("-inf")
    least = np.iinfo(str(zero_point.dtype)).min if zero_point is not None else 0
    return float(scale.item()) * (least - (int(zero_point.item()) if zero_point is not None else 0))


def _constant(node: ir.Node, place: int) -> Array | None:
    value = node.inputs[place] if len(node.inputs) > place else None
    return value.const_value.numpy() if value is not None and value.const_value is not None else None


def _module_of(node: ir.Node) -> str | None:
    """Return the path in torch of a node's weights, from the name of the constant; None where it has none."""
    for value in node.inputs[1:]:
        name = str(value.name) if value is not None and value.const_value is not None else ""
        if name.endswith((".weight", ".bias")):
            return name.rpartition(".")[0].removeprefix("backbone.")
    return None


def _quantizer_of(node: ir.Node) -> str | None:
    """Return the scale and zero point by which a node's input became integers; None where it is in float."""
    first = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
    source = node if node.op_type == "DequantizeLinear" else first
    if source is None or source.op_type != "DequantizeLinear":
        return None
    scale, zero_point = (_constant(source, place) for place in (1, 2))
    if scale is None or scale.size != 1:
        return None
    point = "0" if zero_point is None else f"{zero_point.item()} ({zero_point.dtype})"
    return f"scale {float(scale.item()):.4g}, zero point {point}"


def _more_of(one: ir.Model, other: ir.Model) -> dict[str, int]:
    """Count the operators that one graph has more of; quantizers are what the two are known to differ in."""
    counts = [Counter(node.op_type for node in model.graph) for model in (one, other)]
    more = counts[0] - counts[1]
    return {
        name: more[name] for name in sorted(more) if not name.endswith("quantizeLinear") and name != "QuantizeLinear"
    }
