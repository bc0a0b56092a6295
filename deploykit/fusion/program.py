"""Between a torch module and a `torch.export` program: what every pass over torch graphs needs."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from deploykit.errors import ExportError, plain_reason
from deploykit.fusion.constants import remove_unread
from deploykit.fusion.locate import describe_error
from deploykit.fusion.quiet import quiet_torch
from deploykit.spec import BATCH_DIM, HEIGHT_DIM, WIDTH_DIM, InputSpec

_FIXED = re.compile(r"Constraints violated \(([^)]*)\).*?\n\s*- (.+?)(?:\. |\n|$)", re.DOTALL)
"""How torch says that a dynamic size is one that the code fixes or bounds: which size, and what it is held to."""


def export_program(module: nn.Module, spec: InputSpec) -> torch.export.ExportedProgram:
    """Return `torch.export` of a module called with one image tensor.

    A dynamic batch is traced from two images, since torch takes a size of one for a constant; a range of sizes, whose
    steps are dynamic, from its best size of at least two steps a side.

    Raises:
        ExportError: torch cannot trace it.
    """
    batch = spec.batch if isinstance(spec.batch, int) else 2
    example = torch.zeros(batch, spec.channels, spec.height, spec.width)
    shapes = _dynamic_shapes(spec)
    try:
        with torch.no_grad(), quiet_torch():
            program = torch.export.export(module, (example,), dynamic_shapes=shapes)
    except Exception as error:  # torch.export raises dozens of internal types
        where = describe_error(error, module)
        if fixed := _FIXED.search(str(error)):
            raise ExportError(
                f"torch.export cannot trace the backbone at {spec.shape}: its forward works for some sizes of "
                f"{fixed[1]} alone ({fixed[2]}). Fix: leave out of forward what loops, branches or slices by that "
                "size; or ask for one batch_size, or image_size."
            ) from error
        raise ExportError(
            f"torch.export cannot trace the backbone at {spec.shape}{f' ({where})' if where else ''}: "
            f"{plain_reason(error)}. The usual cause is data-dependent control flow. Fix: in forward, branch on shapes "
            "and settings alone, and not on the values of tensors (.item(), .numpy(), if tensor)."
        ) from error
    remove_unread(program.graph)
    program.graph_module.recompile()
    return program


def _dynamic_shapes(spec: InputSpec) -> tuple[dict[int, Any]] | None:
    """Return which sides of the images are dynamic, as torch.export has it; sizes of a range are whole steps."""
    dynamic: dict[int, Any] = {} if isinstance(spec.batch, int) else {0: torch.export.Dim(BATCH_DIM)}
    if spec.sizes is not None:
        for axis, name in ((2, HEIGHT_DIM), (3, WIDTH_DIM)):
            steps = torch.export.Dim(f"{name}_steps")
            dynamic[axis] = steps * spec.sizes.step if spec.sizes.step > 1 else steps
    return (dynamic,) if dynamic else None
