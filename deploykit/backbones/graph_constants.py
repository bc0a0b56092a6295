"""Tensors that parameters alone decide, as constants of an exported or compiled graph."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn


class GraphConstants(nn.Module):
    """A module with tensors that are computed from its parameters and not from its input.

    An eager call computes them, so that gradients and changed parameters count. Under torch.export
    and torch.compile in eval mode buffers stand in for them; ``eval()`` and ``load_state_dict()``
    bring these up to date. A subclass calls `keep_constants` at the end of its ``__init__``.
    """

    def graph_constants(self) -> dict[str, Tensor]:
        """Return the tensors by the name of the buffer that stands in for each."""
        raise NotImplementedError

    def keep_constants(self) -> None:
        """Make the buffers, and refresh them whenever a state dict is loaded."""
        self.register_load_state_dict_post_hook(_update_constants)  # type: ignore[no-untyped-call]
        self.update_constants()

    def constants(self) -> dict[str, Tensor]:
        """Return the tensors for this call."""
        if self.training or not torch.compiler.is_compiling():
            return self.graph_constants()
        return {name: self.get_buffer(name) for name in self._constant_names}

    @torch.no_grad()
    def update_constants(self) -> None:
        """Copy what the parameters decide into the buffers."""
        constants = self.graph_constants()
        self._constant_names = tuple(constants)
        for name, constant in constants.items():
            self.register_buffer(name, constant.detach().clone(), persistent=False)

    def train(self, mode: bool = True) -> Self:
        """As torch's; eval mode brings the buffers up to date."""
        super().train(mode)
        if not mode:
            self.update_constants()
        return self


def _update_constants(module: nn.Module, _: object) -> None:
    assert isinstance(module, GraphConstants)  # noqa: S101  (it registered this; narrows the type)
    module.update_constants()
