"""What each node of a graph costs in ONNX Runtime, from its profile."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from statistics import median

import onnx_ir as ir

from deploykit.arrays import FloatArray
from deploykit.backends.onnxruntime.integer_attention import PARTS
from deploykit.backends.onnxruntime.session import ort_session
from deploykit.calibration.placement import fused_activation
from deploykit.places import scratch_folder

RUNS = 15
_SUFFIXES = re.compile(r"(_kernel_time|_nchwc|_token_\d+|/MatMulAddFusion|/product)+$")


def integer_savings(
    master: ir.Model, quantized: ir.Model, nodes: Collection[str], batch: FloatArray
) -> dict[str, float] | None:
    """Return how many milliseconds each node runs shorter in integers than in float.

    Args:
        master: the FP32 graph.
        quantized: the same graph as ONNX Runtime's dialect writes it.
        nodes: the integer nodes.
        batch: ``(N, C, H, W)``, a batch of the graph's.

    Returns:
        Milliseconds a node, at least a thousandth of its time in float; None where the profiles
        do not name every node, as some fusions make new names.
    """
    exact, rounded, names = kernel_times(master, batch), kernel_times(quantized, batch), _names(master)
    savings = {}
    for node in nodes:
        in_float, in_integers = (_time(times, node, names.get(node, ())) for times in (exact, rounded))
        if in_float is None or in_integers is None:
            return None
        savings[node] = max(in_float - in_integers, in_float / 1000, 1e-6)
    return savings


def _time(times: dict[str, float], node: str, names: tuple[str, ...]) -> float | None:
    """A node's time, or that of the parts that the dialect has cut it into; None where neither is in the profile."""
    parts = [times[f"{node}/{part}"] for part in PARTS if f"{node}/{part}" in times]
    return sum(parts) if parts else next((times[name] for name in names if name in times), None)


def kernel_times(model: ir.Model, batch: FloatArray) -> dict[str, float]:
    """Return the median time of each kernel in milliseconds, by the name that ONNX Runtime's fusions leave it."""
    source = str(model.graph.inputs[0].name)
    with scratch_folder("profile") as folder:
        session = ort_session(model, profile_to=folder / "profile")
        for _ in range(RUNS):
            session.run(None, {source: batch})
        events = json.loads(session.end_profiling().read_text())
    found: dict[str, list[float]] = {}
    for event in events:
        if event.get("cat") == "Node":
            found.setdefault(_SUFFIXES.sub("", event["name"]), []).append(event["dur"] / 1000)
    return {name: median(times) for name, times in found.items()}


def _names(model: ir.Model) -> dict[str, tuple[str, ...]]:
    """Return what a node's kernel may be called: the node, or the tensor that it and all fused behind it give."""
    names = {}
    for node in model.graph:
        own = [str(node.name), *(str(value.name) for value in node.outputs)]
        value = node.outputs[0]
        readers = list(value.consumers())
        if len(readers) == 1 and readers[0].op_type in ("Add", "Sigmoid", "HardSigmoid"):
            value = readers[0].outputs[0]
            own.append(str(value.name))
        activation = fused_activation(value)
        if activation is not None:
            own.append(str(activation.outputs[0].name))
        names[str(node.name)] = tuple(own)
    return names
