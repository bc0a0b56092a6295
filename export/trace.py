"""A torch backbone to one `torch.export` program with every level and the head as named outputs."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from deploykit.backbones.base import BaseBackbone
from deploykit.fusion.program import export_program
from deploykit.spec import InputSpec


class Everything(nn.Module):
    """A backbone whose ``forward`` gives every selected level and the head, in order, as a tuple."""

    def __init__(self, backbone: BaseBackbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """``(N, C, H, W)`` to the tuple of `output_names`."""
        return tuple(self.backbone.forward_everything(images).values())


def output_names(backbone: BaseBackbone) -> tuple[str, ...]:
    """The names of the outputs of a traced backbone: its levels, then the head where it has one."""
    levels = tuple(level.name for level in backbone.feature_info)
    return levels if backbone.spec.features_only else (*levels, backbone.spec.head_name)


def trace(backbone: BaseBackbone, spec: InputSpec) -> torch.export.ExportedProgram:
    """Trace a backbone in eval mode for one image size and a static or dynamic batch.

    Raises:
        ExportError: torch cannot trace it; the message carries torch's reason.
    """
    module = Everything(copy.deepcopy(backbone).eval().float().requires_grad_(False))
    return export_program(module, spec)
