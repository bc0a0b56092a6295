"""A fused network in FP32: the graph that plans are of, and the same in torch for any batch."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch.fx import GraphModule, Node

from deploykit.errors import CalibrationError


@dataclass(frozen=True, kw_only=True)
class FloatNetwork:
    """A fused network in FP32, as the graph that plans are of and in torch.

    ``traced`` is the program that ``model`` was written from, whose tensors have its names; ``module`` is the same
    network for any batch, and ``outputs`` names what it gives, in order. ``engine_outputs`` are those of them that an
    engine gives; empty: all.
    """

    model: ir.Model
    traced: GraphModule
    module: GraphModule
    outputs: tuple[str, ...]
    engine_outputs: tuple[str, ...] = ()


def tensor_nodes(module: GraphModule) -> list[Node]:
    """Return the calls of a graph that give a tensor, in order: the same for every batch that it was traced with."""
    return [
        node
        for node in module.graph.nodes
        if node.op == "call_function" and isinstance(node.meta.get("val"), torch.Tensor)
    ]


def values_by_name(module: GraphModule, network: FloatNetwork) -> dict[str, Node]:
    """Map the tensors of the master graph to the nodes of a copy of the module for any batch.

    Raises:
        CalibrationError: the two were traced to different operators.
    """
    named, own = tensor_nodes(network.traced), tensor_nodes(module)
    if [node.target for node in named] != [node.target for node in own]:
        raise CalibrationError(
            "the network computes something else for a batch than for one image, so that it cannot be trained in "
            "batches. Choose another recipe."
        )
    values = {one.name: other for one, other in zip(named, own, strict=True)}
    given: Any = module.graph.output_node().args[0]
    values |= dict(zip(network.outputs, given, strict=True))
    (images,) = module.graph.find_nodes(op="placeholder")
    return values | {str(network.model.graph.inputs[0].name): images}


def copy_of(module: GraphModule) -> GraphModule:
    """Return a copy with tensors of its own, and without torch's checks of the shape that was traced."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, where it copies a graph module
        twin = copy.deepcopy(module)
    for node in list(twin.graph.find_nodes(op="call_module", target="_guards_fn")):
        twin.graph.erase_node(node)
    twin.delete_all_unused_submodules()
    twin.recompile()
    return twin
