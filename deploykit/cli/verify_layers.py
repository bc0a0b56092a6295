"""``deploykit verify --layers``: which layer makes the error, and what the others inherit from it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from deploykit.cli.output import show, table
from deploykit.errors import SpecError
from deploykit.parity.report import decibels

if TYPE_CHECKING:
    from rich.table import Table

    from deploykit.export.layers import LayerError, LayerReport

SHOWN = 12


@dataclass(frozen=True, kw_only=True)
class LayersAsked:
    """What the layers of a bundle are to be compared with: another bundle, a runtime, torch, or themselves in float."""

    reference: str | None = None
    in_runtime: str | None = None
    pretrained: bool = False
    weights: str | None = None
    checkpoint_key: str | None = None

    def __post_init__(self) -> None:
        others = {
            "--reference": self.reference is not None,
            "--in-runtime": self.in_runtime is not None,
            "--pretrained": self.pretrained,
            "--weights": self.weights is not None,
        }
        given = [name for name, is_given in others.items() if is_given]
        if len(given) > 1:
            raise SpecError(f"layers are compared with one thing, and {' and '.join(given)} were given. Give one.")
        if self.checkpoint_key is not None and self.weights is None:
            raise SpecError("--checkpoint-key goes with --weights. Fix: give the checkpoint file too.")


def walk_layers(bundle: str, asked: LayersAsked) -> LayerReport:
    """Walk a bundle's layers; a culprit outside the gate is written into the current folder.

    Raises:
        MissingDependency: the extra export is not installed.
        SpecError, BundleError: as `deploykit.export.bundle_layers.bundle_layers`.
        WeightsError: as `deploykit.export.torch_layers.torch_layers`.
    """
    from deploykit.optional import require

    require("onnx_ir")
    reproducer = _reproducer(bundle)
    if asked.weights is not None or asked.pretrained:
        require("torch")
        from deploykit.export.torch_layers import torch_layers

        source = asked.pretrained if asked.weights is None else asked.weights
        return torch_layers(Path(bundle), pretrained=source, checkpoint_key=asked.checkpoint_key, reproducer=reproducer)
    from deploykit.export.bundle_layers import bundle_layers

    other = None if asked.reference is None else Path(asked.reference)
    return bundle_layers(Path(bundle), other, runtime=asked.in_runtime, reproducer=reproducer)


def show_layers(bundle: str, found: LayerReport) -> None:
    """Show the layers with the largest errors of their own, and the culprit."""
    show(_table(found))
    for one, counts in (("reference", found.only_reference), ("bundle", found.only_candidate)):
        if counts:
            show(f"only the {one} has: {', '.join(f'{count} {name}' for name, count in counts.items())}.")
    worst = found.culprit
    if worst is None:
        show(f"Every one of the {len(found.layers)} layers gives what the reference's gives, on the same input.")
        return
    gate = found.min_own_db
    what = "The largest error of its own has" if gate is None else "The first culprit is"
    of = f" (torch: {worst.module})" if worst.module else ""
    reads = f"; it reads {worst.quantizer}" if worst.quantizer else ""
    figure = f"{worst.own_db:.1f} dB{reads}" if worst.note is None else worst.note
    show(f"{what} {worst.node}{of}, {worst.operator}, which gives {worst.tensor}: {figure}.")
    if gate is not None and worst.note is None:
        show(f"Alone, with its input and what it should give: {_reproducer(bundle)} and .npz.")


def _reproducer(bundle: str) -> Path:
    return Path(f"{Path(bundle).absolute().name}-culprit.onnx")


def _table(found: LayerReport) -> Table:
    chosen = sorted(found.layers, key=lambda layer: layer.own_db)[:SHOWN]
    rows = [_row(layer) for layer in chosen]
    columns = ("layer gives", "node", "operator", "torch", "own dB", "whole dB", "reads")
    title = f"The largest of {len(found.layers)} layers' own errors against {found.reference}"
    return table(columns, rows, right=("own dB", "whole dB"), title=title)


def _row(layer: LayerError) -> list[str]:
    return [
        layer.tensor,
        layer.node,
        layer.operator,
        layer.module or "",
        decibels(layer.own_db),
        decibels(layer.whole_db),
        layer.quantizer or "float",
    ]
