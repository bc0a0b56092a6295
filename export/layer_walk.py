"""Run a part of a graph on another graph's tensors, and the whole graph beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as ir_passes

from deploykit.arrays import Array
from deploykit.fusion.quiet import quiet_loggers
from deploykit.onnx_session import Arrays, onnx_session
from deploykit.parity.metrics import sqnr_db
from deploykit.parity.report import MAX_SQNR_DB, capped
from deploykit.places import storage_error

RunPart: TypeAlias = Callable[[ir.Model, Arrays], list[Array]]
"""What computes a part of a graph on given inputs: its outputs, in order."""

GiveTensors: TypeAlias = Callable[[Sequence[str]], list[Array]]
"""What gives tensors of a network for one batch by name, in the order asked for."""

REFERENCE = "/reference"
"""The end of an input's name that stands for the reference's tensor."""

FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


def node_by_node(part: ir.Model, feeds: Arrays) -> list[Array]:
    """Compute a part of a graph as it is written."""
    return onnx_session(part, optimize=False).run([str(value.name) for value in part.graph.outputs], feeds)


def typed(model: ir.Model) -> ir.Model:
    """Return a graph whose every tensor says its type, which a file may leave out; one that has none stays as it is."""
    if all(value.dtype is not None for node in model.graph for value in node.outputs if value.name):
        return model.clone()
    with quiet_loggers(ir_passes.ShapeInferencePass.__module__):  # it prints the traceback of what it goes on without
        return ir_passes.ShapeInferencePass()(model.clone()).model


class Walk:
    """A graph and its reference on one batch; ``found`` and ``expected`` give their shared tensors and own outputs.

    Args:
        candidate: the graph.
        reference: another graph that has the tensors too, or what gives them.
        names: the shared tensors.
        batch: as both take it.
        run: what computes the candidate's layers.
    """

    def __init__(
        self,
        candidate: ir.Model,
        reference: ir.Model | GiveTensors,
        names: Sequence[str],
        batch: Array,
        run: RunPart = node_by_node,
    ) -> None:
        self._candidate = candidate
        self._batch = batch
        self._run = run
        self._cuts = set(names)
        self.found = giving(candidate, names, batch)
        self.expected = giving(reference, names, batch) if isinstance(reference, ir.Model) else reference

    def errors(self, group: Sequence[str]) -> Iterator[tuple[str, float, float]]:
        """Yield each tensor of a group with its own error and that of the whole network, in dB."""
        found, expected, given = self._values(group)
        part, feeds = self._part(group, given)
        read = {str(value.name) for value in part.graph.inputs}
        fed = {name: array for name, array in feeds.items() if name in read}
        own = dict(zip(group, self._run(part, fed), strict=True))
        for name in group:
            yield name, decibels_between(expected[name], own[name]), decibels_between(expected[name], found[name])

    def reproduce(self, tensor: str, path: Path) -> None:
        """Write one layer, the reference's tensors that it reads, and what the reference gives.

        Raises:
            StorageError: the files cannot be written.
        """
        _, expected, given = self._values([tensor])
        part, feeds = self._part([tensor], given)
        read = {str(value.name) for value in part.graph.inputs}
        try:
            ir.save(part, path)
            arrays = {f"input/{name}": array for name, array in feeds.items() if name in read}
            np.savez_compressed(path.with_suffix(".npz"), allow_pickle=False, **arrays, expected=expected[tensor])
        except OSError as error:
            raise storage_error(f"the layer {path} cannot be written", error) from error

    def _values(self, group: Sequence[str]) -> tuple[Arrays, Arrays, Arrays]:
        """Return what candidate and reference give for a group and what it reads, and the latter as it is fed."""
        read = self._read_by(group)
        asked = list(dict.fromkeys((*group, *read)))
        found, expected = (dict(zip(asked, give(asked), strict=True)) for give in (self.found, self.expected))
        return found, expected, {name: _as_read(expected[name], found[name]) for name in read}

    def _read_by(self, group: Sequence[str]) -> list[str]:
        """Return the shared tensors that the layers of a group read."""
        values = {str(value.name): value for node in self._candidate.graph for value in node.outputs}
        found: dict[str, None] = {}
        stack = [operand for name in group for operand in operands_of(values[name])]
        seen = set()
        while stack:
            value = stack.pop()
            if value in seen:
                continue
            seen.add(value)
            if str(value.name) in self._cuts:
                found[str(value.name)] = None
            else:
                stack += operands_of(value)
        return list(found)

    def _part(self, group: Sequence[str], given: Arrays) -> tuple[ir.Model, Arrays]:
        """Return the layers of a group, which read the reference's tensors, and what feeds them."""
        copy = self._candidate.clone()
        values = {str(value.name): value for node in copy.graph for value in node.outputs}
        inputs = []
        for name, array in given.items():
            dtype = ir.tensor(np.zeros(0, array.dtype)).dtype
            cut = ir.Value(name=f"{name}{REFERENCE}", shape=ir.Shape(array.shape), type=ir.TensorType(dtype))
            for usage in list(values[name].uses()):
                usage.node.replace_input_with(usage.idx, cut)
            inputs.append(cut)
        source = copy.graph.inputs[0]
        copy.graph.inputs.extend(inputs)
        copy.graph.outputs.clear()
        copy.graph.outputs.extend(values[name] for name in group)
        part = ir.convenience.extract(copy.graph, list(copy.graph.inputs), list(group))
        part.opset_imports.update(copy.graph.opset_imports)
        feeds = {f"{name}{REFERENCE}": array for name, array in given.items()} | {str(source.name): self._batch}
        return ir.Model(part, ir_version=copy.ir_version), feeds


def giving(model: ir.Model, names: Sequence[str], batch: Array) -> GiveTensors:
    """Open a graph on a batch; any of these tensors and of its outputs can then be asked."""
    copy = model.clone()
    values = {str(value.name): value for node in copy.graph for value in node.outputs}
    own = {str(value.name) for value in copy.graph.outputs}
    copy.graph.outputs.extend(values[name] for name in names if name not in own)
    session, source = onnx_session(copy, optimize=False), str(model.graph.inputs[0].name)
    return lambda asked: session.run_path(asked, {source: batch})


def _as_read(expected: Array, found: Array) -> Array:
    """Return the reference's tensor as the candidate's layers read it; of another shape they cannot."""
    return expected.astype(found.dtype) if expected.shape == found.shape else found


def computed(model: ir.Model) -> list[ir.Value]:
    """Return the float tensors that depend on the images, in order."""
    moving: set[ir.Value | None] = set(model.graph.inputs)
    found = []
    for node in model.graph:
        if not any(value in moving for value in node.inputs):
            continue
        moving.update(node.outputs)
        found += [value for value in node.outputs if value.name and value.dtype in FLOATS]
    return found


def operands_of(value: ir.Value) -> list[ir.Value]:
    """Return what the node reads that gives a value."""
    node = value.producer()
    return [] if node is None else [operand for operand in node.inputs if operand is not None]


def decibels_between(expected: Array, found: Array) -> float:
    """Return the SQNR, capped; tensors of two shapes are as far apart as can be."""
    if expected.shape != found.shape or not expected.size:
        return -MAX_SQNR_DB
    wanted = expected.astype(np.float32)
    if not np.isfinite(wanted).all():
        return MAX_SQNR_DB  # a mask's infinities: nothing can be said
    return capped(sqnr_db(wanted, found.astype(np.float32)))
