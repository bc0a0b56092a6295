"""A torch backbone to one `torch.export` program with every level and the head as named outputs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deploykit.backbones.base import BaseBackbone
from deploykit.backbones.inference_copy import inference_copy
from deploykit.backbones.random_state import kept_random_states
from deploykit.errors import ExportError
from deploykit.export.purity import (
    check_images_apart,
    check_no_batch_statistics,
    check_no_random_operators,
    check_repeatable,
)
from deploykit.fusion.functional_form import functional_form
from deploykit.fusion.program import export_program
from deploykit.spec import InputSpec


class Everything(nn.Module):
    """A backbone whose ``forward`` gives every selected level and the head, in order, as a tuple."""

    def __init__(self, backbone: BaseBackbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Map ``(N, C, H, W)`` to the tuple of `output_names`."""
        return tuple(self.backbone.forward_everything(images).values())


def output_names(backbone: BaseBackbone) -> tuple[str, ...]:
    """Return the names of the outputs of a traced backbone: its levels, then the head where it has one."""
    levels = tuple(level.name for level in backbone.feature_info)
    return levels if backbone.spec.features_only else (*levels, backbone.spec.head_name)


def trace(backbone: BaseBackbone, spec: InputSpec) -> torch.export.ExportedProgram:
    """Trace a backbone in eval mode for one image size and a static or dynamic batch.

    The program writes nothing in place, and an image's outputs depend on that image alone.

    Raises:
        SpecError: part of the backbone is TorchScript, or it does not run in float32 on the CPU.
        ExportError: torch cannot trace it (the message carries torch's reason), it does not give the same
            numbers twice (the message names the operator or the submodule), or an image's numbers depend on the
            others of its batch.
    """
    with kept_random_states():
        twin = inference_copy(backbone)
        try:
            program = export_program(Everything(twin), spec)
        except ExportError:
            check_repeatable(twin)  # a branch on a random number is the better reason
            raise
    check_no_random_operators(program.graph_module)
    check_no_batch_statistics(program)
    check_repeatable(twin)
    if spec.batch != 1:
        check_images_apart(twin, spec.batch if isinstance(spec.batch, int) else 2)
    return functional_form(program, spec)
