"""Whether a graph gives the outputs that it should, each under its own name."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from deploykit.export.layer_walk import Walk, computed, decibels_between

TWIN_DB, NEARER_DB = 10.0, 20.0
"""An output that is so near to what another should give, and nearer than to its own by this, gives the other's."""


def wrong_outputs(candidate: ir.Model, walk: Walk, names: Sequence[str], known: Sequence[str]) -> dict[str, str]:
    """Say of each output what is wrong with its name.

    Args:
        candidate: the graph.
        walk: of it and its reference.
        names: the outputs that it has to give.
        known: those of them that the reference gives.
    """
    own = [str(value.name) for value in candidate.graph.outputs]
    expected = dict(zip(known, walk.expected(known), strict=True))
    moving = {str(value.name) for value in computed(candidate)}
    wrong: dict[str, str] = {}
    renamed: set[str] = set()
    for name, values in zip(own, walk.found(own), strict=True):
        figures = {other: decibels_between(array, values) for other, array in expected.items()}
        best = max(figures.values(), default=0.0)
        twins = [other for other, figure in figures.items() if figure == best >= TWIN_DB]
        if name not in names:
            gives = f"; it gives what {twins[0]!r} should" if twins else ""
            wrong[name] = f"the graph gives {name!r}, which is no output of the network{gives}"
            renamed.update(twins)
        elif name not in moving:
            wrong[name] = f"{name!r} does not depend on the images"
        elif twins and name in figures and figures[name] < best - NEARER_DB:
            wrong[name] = f"{name!r} gives what {twins[0]!r} should"
    for name in names:
        if name not in own and name not in renamed:
            wrong[name] = f"{name!r} is an output of the network, and the graph does not give it"
    return wrong
