"""Keep running statistics as they are while a checkpointed stage is computed a second time."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase


class KeptStatistics:
    """Within it, the stage's norms in training mode move copies of their running statistics, which are then dropped."""

    def __init__(self, stage: nn.Module) -> None:
        self._stage = stage
        self._kept: list[tuple[nn.Module, dict[str, Tensor]]] = []

    def __enter__(self) -> None:
        norms = [module for module in self._stage.modules() if isinstance(module, _NormBase) and module.training]
        self._kept = [(norm, dict(norm.named_buffers(recurse=False))) for norm in norms]
        # Copies and not None: autograd saves the statistics, and a checkpoint wants as many tensors saved again.
        for norm, buffers in self._kept:
            for name, buffer in buffers.items():
                setattr(norm, name, buffer.clone())

    def __exit__(self, *raised: object) -> None:
        for norm, buffers in self._kept:
            for name, buffer in buffers.items():
                setattr(norm, name, buffer)
        self._kept = []
