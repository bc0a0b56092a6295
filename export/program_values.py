"""The tensors of a torch program, by the names that they have in the ONNX graph written from it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Interpreter, Node

from deploykit.arrays import Array, FloatArray
from deploykit.graph import TorchProgram
from deploykit.onnx_session import Arrays


class ProgramValues:
    """A program that runs node by node and gives any of its float tensors.

    ``nodes`` is what computes each of them, by the tensor's name in the ONNX graph, in order.
    """

    def __init__(self, program: TorchProgram) -> None:
        self._module = program.program.module()
        (output,) = self._module.graph.find_nodes(op="output")
        outputs = dict(
            zip((node.name for node in output.args[0]), (spec.name for spec in program.outputs), strict=True)
        )
        taken = set(outputs.values())  # what else had such a name has another one in the graph
        self.nodes: dict[str, Node] = {
            outputs.get(node.name, node.name): node
            for node in self._module.graph.nodes
            if node.op == "call_function" and (node.name in outputs or node.name not in taken)
        }

    def give(self, names: Iterable[str], batch: FloatArray) -> Arrays:
        """Return the float tensors among these names for images ``(N, C, H, W)``; others are left out."""
        wanted = {self.nodes[name].name: name for name in names if name in self.nodes}
        found: dict[str, Array] = {}

        class Recorded(Interpreter):
            """Keeps what is wanted of what each call gives."""

            def run_node(self, node: Node) -> Any:
                """Run a node and note its tensor."""
                result = super().run_node(node)
                name = wanted.get(node.name)
                if name is not None and isinstance(result, Tensor) and result.is_floating_point():
                    found[name] = result.numpy()
                return result

        with torch.no_grad():
            Recorded(self._module).run(torch.tensor(batch))
        return found
