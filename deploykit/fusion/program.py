"""Between a torch module and a `torch.export` program: what every pass over torch graphs needs."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from deploykit.errors import ExportError
from deploykit.fusion.constants import remove_unread
from deploykit.spec import BATCH_DIM, InputSpec


def export_program(module: nn.Module, spec: InputSpec) -> torch.export.ExportedProgram:
    """`torch.export` of a module called with one image tensor.

    A dynamic batch is traced from two images, since torch takes a size of one for a constant.

    Raises:
        ExportError: torch cannot trace it.
    """
    dynamic = not isinstance(spec.batch, int)
    example = torch.zeros(2 if dynamic else spec.batch, spec.channels, spec.height, spec.width)  # type: ignore[arg-type]
    shapes: Any = ({0: torch.export.Dim(BATCH_DIM)},) if dynamic else None
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own deprecations while it traces
            program = torch.export.export(module, (example,), dynamic_shapes=shapes)
    except Exception as error:  # torch.export raises dozens of internal types
        reason = str(error).strip().splitlines()
        raise ExportError(
            f"torch.export cannot trace the backbone at {spec.shape}: {reason[0] if reason else type(error).__name__}. "
            "Data-dependent control flow in a custom backbone is the usual cause."
        ) from error
    remove_unread(program.graph)
    program.graph_module.recompile()
    return program
