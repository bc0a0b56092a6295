"""Submodules that a rewriting adds to a float module in torch, beside those that it has, and the calls of them."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.fx import GraphModule, Node

HOLDER = "fake_quantizers"
"""The submodule of all that is added."""


class AddedModules:
    """What one rewriting adds to a module."""

    def __init__(self, module: GraphModule) -> None:
        self._module = module
        module.add_module(HOLDER, nn.Module())
        self._holder = module.get_submodule(HOLDER)
        self._count = 0

    def call(self, added: nn.Module, *arguments: Any) -> Node:
        """Insert a call at the graph's insertion point; a module that is known is called again."""
        name = next((name for name, module in self._holder.named_children() if module is added), f"q{self._count}")
        self._count += 1
        self._holder.add_module(name, added)
        return self._module.graph.call_module(f"{HOLDER}.{name}", arguments)

    def read(self, name: str, parameter: nn.Parameter) -> Node:
        """Insert the reading of a new parameter at the graph's insertion point."""
        self._holder.register_parameter(name, parameter)
        return self._module.graph.get_attr(f"{HOLDER}.{name}")
