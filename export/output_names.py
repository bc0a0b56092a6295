"""Give a graph's outputs the names that the user chose, whatever else in the graph has them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import onnx_ir as ir


def name_outputs(model: ir.Model, names: Sequence[str]) -> None:
    """Name the outputs of a graph in order; each is a value of its own, which one node computes.

    Another value of one of these names gets a free one; the inputs keep theirs.

    Args:
        model: changed in place.
        names: one for each output, all different, and none an input's.
    """
    graph = model.graph
    fixed = [value for value in graph.inputs if value.name is not None]
    for position, output in enumerate(list(graph.outputs)):
        if output.producer() is None or any(output is earlier for earlier in graph.outputs[:position]):
            graph.outputs[position] = _copied(graph, output)
    wanted, outputs = set(names), {id(output) for output in graph.outputs}
    taken = {str(value.name) for value in _values(graph)} | wanted
    for value in list(_values(graph)):
        if value.name in wanted and id(value) not in outputs and not any(value is each for each in fixed):
            value.name = _free(str(value.name), taken)
            taken.add(value.name)
    # Two steps, since an output may now have the name that another one wants.
    for output in graph.outputs:
        output.name = _free("output", taken)
        taken.add(output.name)
    for output, name in zip(graph.outputs, names, strict=True):
        output.name = name


def _copied(graph: ir.Graph, value: ir.Value) -> ir.Value:
    """Return the value again, computed by an Identity: of an input, a constant, or what is an output already."""
    node = ir.node("Identity", [value])
    node.outputs[0].shape, node.outputs[0].type = value.shape, value.type
    graph.append(node)
    return node.outputs[0]


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    """Yield every value of a graph and of the subgraphs in it."""
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                yield from _values(attribute.as_graph())


def _free(name: str, taken: set[str]) -> str:
    count = 1  # a slash, which no name of a torch program has
    while f"{name}/{count}" in taken:
        count += 1
    return f"{name}/{count}"
