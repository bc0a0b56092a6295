"""Runs named passes over a traced program, and proves after each that the numbers stand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch.func import functional_call
from torch.fx import GraphModule

from deploykit.errors import ExportError, FusionError, plain_reason
from deploykit.fusion.cut_unread_rows import cut_unread_rows
from deploykit.fusion.drop_identities import drop_identities
from deploykit.fusion.fold_attention_scale import fold_attention_scale
from deploykit.fusion.fold_batchnorm import fold_batchnorm
from deploykit.fusion.fold_constants import fold_constants
from deploykit.fusion.fold_layernorm import fold_layernorm
from deploykit.fusion.fold_pad import fold_pad
from deploykit.fusion.fold_scale import fold_scale
from deploykit.fusion.fuse_attention import fuse_attention
from deploykit.fusion.merge_branches import merge_branches
from deploykit.fusion.merge_linears import merge_linears
from deploykit.fusion.plain_divisor import plain_divisor
from deploykit.fusion.program import export_program
from deploykit.fusion.resize_by_matrix import resize_by_matrix
from deploykit.fusion.silence_masks import silence_masks
from deploykit.fusion.split_activations import split_activations
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

_FOLDS: tuple[FusionPass, ...] = (
    # First: dropout and in-place operators stand between the patterns of all others.
    FusionPass(name="drop-identities", rewrite=drop_identities, min_sqnr_db=EXACT_DB),
    # Operators that torch's ONNX exporter writes wrongly.
    FusionPass(name="resize-by-matrix", rewrite=resize_by_matrix, min_sqnr_db=EXACT_DB),
    FusionPass(name="plain-divisor", rewrite=plain_divisor, min_sqnr_db=EXACT_DB),
    # Before the folds, which take constants and not what computes them.
    FusionPass(name="fold-constants", rewrite=fold_constants, min_sqnr_db=EXACT_DB),
    FusionPass(name="fuse-attention", rewrite=fuse_attention, min_sqnr_db=EXACT_DB),
    FusionPass(name="silence-masks", rewrite=silence_masks, min_sqnr_db=EXACT_DB),
    # Before the scales: a layer scale behind a BatchNorm then reaches the convolution.
    FusionPass(name="fold-batchnorm", rewrite=fold_batchnorm, min_sqnr_db=EXACT_DB),
    FusionPass(name="fold-scale", rewrite=fold_scale, min_sqnr_db=EXACT_DB),
    # After both folds, so that branches are convolutions; it folds again behind each sum that it merges.
    FusionPass(name="merge-branches", rewrite=merge_branches, min_sqnr_db=EXACT_DB),
    # After the folds, which go through a concatenation but not through an activation behind it.
    FusionPass(name="split-activations", rewrite=split_activations, min_sqnr_db=EXACT_DB),
    FusionPass(name="fold-layernorm", rewrite=fold_layernorm, min_sqnr_db=EXACT_DB),
    FusionPass(name="fold-attention-scale", rewrite=fold_attention_scale, min_sqnr_db=EXACT_DB),
    # After the folds, which then see one layer with one reader and not the parts of a split.
    FusionPass(name="merge-linears", rewrite=merge_linears, min_sqnr_db=EXACT_DB),
    # After BatchNorm: a shift before a convolution folds only where the convolution does not pad.
    FusionPass(name="fold-pad", rewrite=fold_pad, min_sqnr_db=EXACT_DB),
    # Again: attention that was fused or merged leaves transpositions beside those that were spelled out.
    FusionPass(name="drop-leftovers", rewrite=drop_identities, min_sqnr_db=EXACT_DB),
)


def export_passes(*scaling: FusionPass) -> tuple[FusionPass, ...]:
    """Return what an export runs, in its order; what one runtime alone gets is in its dialect's ``optimize``.

    Args:
        scaling: passes that move scales between the layers as the folds leave them.
    """
    # Last: it computes a few rows beside all of them, and a weight that two layers read is one that no pass may change.
    cutting = FusionPass(name="cut-unread-rows", rewrite=cut_unread_rows, min_sqnr_db=EXACT_DB)
    return (*_FOLDS, *scaling, cutting)


EXPORT_PASSES: tuple[FusionPass, ...] = export_passes()
"""`export_passes` of every precision but INT8, which scales (see ``calibration/equalization.py``)."""


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

    Outputs are compared in double precision, so that what a pass changes is told apart from FP32's
    rounding; no pass is held to more than that rounding leaves of the network's own outputs. A graph
    that fixes a type inside is compared in its own. Where a network jumps, as a nearest neighbour does, a constant
    that is folded in FP32 may fall to another side than one in double: there FP32's own numbers must stand.

    Args:
        module: the graph module of a `torch.export` program in eval mode, giving a tuple of tensors.
        example: images ``(N, C, H, W)`` on which the numbers are compared after every pass.
        passes: what to run.

    Raises:
        FusionError: a pass raised, or changed the numbers by more than it promises; the message
            names it and the passes already run.
        ExportError: the graph does not run.
    """
    records: list[FusionRecord] = []
    try:
        before = _outputs(module, example)
    except Exception as error:  # what torch traced, it need not be able to run
        raise ExportError(
            f"the traced backbone does not run: {plain_reason(error)}. The usual cause is torch.vmap or another "
            "function transform in its forward. Fix: write that part without it."
        ) from error
    in_fp32 = _outputs(module, example, torch.float)
    rounding_db = _worst_db(before, in_fp32)
    for step in passes:
        done = ", ".join(record.name for record in records) or "none"
        try:
            rewrites = step.rewrite(module)
        except Exception as error:
            raise FusionError(f"the pass {step.name!r} failed: {error}. Passes already run: {done}.") from error
        after = _outputs(module, example) if rewrites else before
        kept = _worst_db(before, after)
        promised = min(step.min_sqnr_db, rounding_db)
        if not (kept >= promised or _worst_db(in_fp32, _outputs(module, example, torch.float)) >= step.min_sqnr_db):
            raise FusionError(
                f"the pass {step.name!r} changed the numbers: {kept:.1f} dB against before, it promises "
                f"{step.min_sqnr_db:.0f} dB. Passes already run: {done}."
            )
        records.append(FusionRecord(name=step.name, rewrites=rewrites, sqnr_db=kept))
        before = after
    return tuple(records)


def _outputs(
    module: GraphModule, example: torch.Tensor, dtype: torch.dtype = torch.double
) -> list[npt.NDArray[np.floating]]:
    """Return what the graph gives with its parameters and its input in ``dtype``, or in FP32 where it cannot run so."""
    tensors = dict((*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)))
    converted = {name: tensor.to(dtype) for name, tensor in tensors.items() if tensor.is_floating_point()}
    with torch.no_grad():
        try:
            outputs = functional_call(module, converted, (example.to(dtype),), tie_weights=False)
        except RuntimeError:
            outputs = module(example)
        return [output.numpy() for output in outputs]


def _worst_db(before: list[npt.NDArray[np.floating]], after: list[npt.NDArray[np.floating]]) -> float:
    return min(sqnr_db(old, new) for old, new in zip(before, after, strict=True))
