"""Plant faults at random places of engines and ask the layer walk for them: how many are found, and at their node.

    python benchmarks/localize_faults.py BUNDLE... --faults 20

A fault that changes no layer on the images (a branch of zeros, two equal channels) is drawn again. The bundles hold
ONNX graphs.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir

from deploykit.bundle import open_bundle
from deploykit.export.bundle_layers import engine_graph
from deploykit.export.layers import SAME_DB, compare_layers

WEIGHTED = ("Conv", "Gemm", "MatMul")
ACTIVATIONS = ("Relu", "Clip", "HardSwish", "HardSigmoid", "Sigmoid", "Gelu", "Erf")
TRIES = 200


def weight_of(node: ir.Node) -> ir.Value | None:
    """The constant that holds a node's weight: of the node itself, or of the DequantizeLinear before it."""
    value = node.inputs[1]
    source = value.producer() if value is not None else None
    if source is not None and source.op_type == "DequantizeLinear":
        value = source.inputs[0]
    return value if value is not None and value.const_value is not None and len(value.const_value.shape) > 1 else None


def changed(value: ir.Value, change: Callable[[np.ndarray], np.ndarray]) -> bool:
    """Replace a constant; whether it differs then."""
    before = value.const_value.numpy()
    after = change(before.copy()).astype(before.dtype)
    value.const_value = ir.tensor(np.ascontiguousarray(after), name=value.name)
    return not np.array_equal(before, after)


def scaled(model: ir.Model, node: ir.Node) -> bool:
    """The weight, or the scale of one in integers, times 1.01."""
    source = node.inputs[1].producer()
    value = source.inputs[1] if source is not None and source.op_type == "DequantizeLinear" else weight_of(node)
    return weight_of(node) is not None and value.const_value is not None and changed(value, lambda array: array * 1.01)


def negated(model: ir.Model, node: ir.Node) -> bool:
    """The weight with the other sign."""
    value = weight_of(node)
    return value is not None and changed(
        value, lambda array: np.maximum(array, -127 if array.dtype == np.int8 else array) * -1
    )


def swapped(model: ir.Model, node: ir.Node) -> bool:
    """The weight with its first two output channels in each other's place."""
    value = weight_of(node)
    axis = 0 if node.op_type != "MatMul" else 1
    if value is None or value.const_value.shape[axis] < 2:
        return False
    return changed(value, lambda array: np.take(array, [1, 0, *range(2, array.shape[axis])], axis=axis))


def transposed(model: ir.Model, node: ir.Node) -> bool:
    """The kernel with rows for columns."""
    value = weight_of(node)
    if value is None or len(value.const_value.shape) != 4 or value.const_value.shape[2] < 2:
        return False
    return changed(value, lambda array: array.swapaxes(2, 3))


def dropped(model: ir.Model, node: ir.Node) -> bool:
    """An activation that is not there: what reads it reads what it read."""
    output = node.outputs[0]
    if node.op_type not in ACTIVATIONS or output in set(model.graph.outputs):
        return False
    ir.convenience.replace_all_uses_with(output, node.inputs[0])
    model.graph.remove(node, safe=True)
    return True


def shifted(model: ir.Model, node: ir.Node) -> bool:
    """The zero point of one dequantizer of activations, off by one."""
    if node.op_type != "DequantizeLinear" or node.inputs[0].const_value is not None or len(node.inputs) < 3:
        return False
    point = node.inputs[2]
    if point is None or point.const_value is None or point.const_value.numpy().size != 1:
        return False
    moved = ir.Value(name=f"{point.name}/moved", shape=point.shape, type=point.type)
    array = point.const_value.numpy()
    moved.const_value = ir.tensor(
        np.asarray(int(array) + (1 if int(array) < np.iinfo(array.dtype).max else -1), array.dtype), name=moved.name
    )
    model.graph.initializers.add(moved)
    node.replace_input_with(2, moved)
    return True


FAULTS = {"weight x1.01": scaled, "sign flip": negated, "swapped channels": swapped, "transposed kernel": transposed}
FAULTS |= {"dropped activation": dropped, "zero point off by one": shifted}


def right_nodes(model: ir.Model, node: ir.Node) -> set[str]:
    """The nodes at which a fault of ``node`` may be named: itself; for one that is gone, those that read it."""
    names = {str(node.name)}
    if node.op_type in ACTIVATIONS:
        for usage in node.outputs[0].uses():
            names |= {str(usage.node.name)} | {str(each.node.name) for each in usage.node.outputs[0].uses()}
    return names


def trial(
    model: ir.Model, images: np.ndarray, fault: Callable, generator: np.random.Generator
) -> tuple[bool, str] | None:
    """Plant one fault that shows; whether it is named at its node, and what was said. None: it has no place here."""
    nodes = list(model.graph)
    for place in generator.permutation(len(nodes))[:TRIES]:
        candidate = model.clone()
        node = list(candidate.graph)[place]
        if fault not in (dropped, shifted) and node.op_type not in WEIGHTED:
            continue
        expected = right_nodes(candidate, node)
        if not fault(candidate, node):
            continue
        report = compare_layers(candidate, images, reference=model, min_own_db=SAME_DB)
        if all(layer.own_db >= 300 for layer in report.layers):
            continue  # it shows nowhere
        found = report.culprit
        return (found is not None and found.node in expected), f"{node.name}: {found.node if found else 'none'}"
    return None


def main() -> None:
    """Plant, look, and count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument("--faults", type=int, default=5, help="of each kind, for each bundle")
    arguments = parser.parse_args()
    generator = np.random.default_rng(0)
    for bundle in arguments.bundles:
        manifest = open_bundle(bundle)
        model, images = engine_graph(bundle, manifest)
        tried: Counter[str] = Counter()
        right: Counter[str] = Counter()
        for name, fault in FAULTS.items():
            for _ in range(arguments.faults):
                result = trial(model, images, fault, generator)
                if result is None:
                    break
                tried[name] += 1
                right[name] += result[0]
                if not result[0]:
                    print(f"  {bundle.name}: {name} at {result[1]}")
        counts = ", ".join(f"{name} {right[name]}/{tried[name]}" for name in tried)
        print(f"{bundle.name}: {sum(right.values())} of {sum(tried.values())} at their node ({counts})", flush=True)


if __name__ == "__main__":
    main()
