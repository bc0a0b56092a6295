"""Runs named passes over a traced program, and proves after each that the numbers stand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch.fx import GraphModule

from deploykit.errors import FusionError
from deploykit.fusion.fold_batchnorm import fold_batchnorm
from deploykit.fusion.program import export_program
from deploykit.parity.metrics import sqnr_db
from deploykit.spec import InputSpec

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, kw_only=True)
class FusionPass:
    """A rewrite in place that returns how often it applied, and the SQNR in dB that it promises to keep."""

    name: str
    rewrite: Callable[[GraphModule], int]
    min_sqnr_db: float


@dataclass(frozen=True, kw_only=True)
class FusionRecord:
    """What one pass did: how many rewrites, and the worst SQNR of any output against before, in dB."""

    name: str
    rewrites: int
    sqnr_db: float


EXACT_DB = 100.0
"""What a pass keeps that is exact in real arithmetic: only the order of FP32 additions changes."""

EXPORT_PASSES: tuple[FusionPass, ...] = (
    FusionPass(name="fold-batchnorm", rewrite=fold_batchnorm, min_sqnr_db=EXACT_DB),
)
"""What every export runs; each runtime's own compiler fuses activations and pads after it."""


@dataclass(frozen=True, kw_only=True)
class FusedProgram:
    """A program after its passes, and what each of them did."""

    program: torch.export.ExportedProgram
    records: tuple[FusionRecord, ...]


def fuse(
    program: torch.export.ExportedProgram,
    spec: InputSpec,
    images: npt.NDArray[np.float32],
    passes: Sequence[FusionPass] = EXPORT_PASSES,
) -> FusedProgram:
    """Run the passes over a traced program, compared on the first batch of ``images`` ``(N, C, H, W)``.

    Raises:
        FusionError: a pass failed or changed the numbers.
    """
    batch = spec.batch if isinstance(spec.batch, int) else 2
    module = program.module()
    records = run_passes(module, torch.from_numpy(images[np.arange(batch) % len(images)]), passes)
    return FusedProgram(program=export_program(module, spec), records=records)


def run_passes(
    module: GraphModule, example: torch.Tensor, passes: Sequence[FusionPass] = EXPORT_PASSES
) -> tuple[FusionRecord, ...]:
    """Apply passes in order to a flat inference graph, in place.

    Args:
        module: the graph module of a `torch.export` program in eval mode, giving a tuple of tensors.
        example: images ``(N, C, H, W)`` on which the numbers are compared after every pass.
        passes: what to run.

    Raises:
        FusionError: a pass raised, or changed the numbers by more than it promises; the message
            names it and the passes already run.
    """
    records: list[FusionRecord] = []
    before = _outputs(module, example)
    for step in passes:
        done = ", ".join(record.name for record in records) or "none"
        try:
            rewrites = step.rewrite(module)
        except Exception as error:
            raise FusionError(f"the pass {step.name!r} failed: {error}. Passes already run: {done}.") from error
        after = _outputs(module, example) if rewrites else before
        kept = min(sqnr_db(old, new) for old, new in zip(before, after, strict=True))
        if not kept >= step.min_sqnr_db:
            raise FusionError(
                f"the pass {step.name!r} changed the numbers: {kept:.1f} dB against before, it promises "
                f"{step.min_sqnr_db:.0f} dB. Passes already run: {done}."
            )
        records.append(FusionRecord(name=step.name, rewrites=rewrites, sqnr_db=kept))
        before = after
    return tuple(records)


def _outputs(module: GraphModule, example: torch.Tensor) -> list[npt.NDArray[np.float32]]:
    with torch.no_grad():
        return [output.numpy() for output in module(example)]
