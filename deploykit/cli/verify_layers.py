"""``deploykit verify --layers``: which layer makes the error, and what the others inherit from it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from deploykit.cli.output import show, table
from deploykit.parity.report import decibels

if TYPE_CHECKING:
    from rich.table import Table

    from deploykit.export.layers import LayerError, LayerReport

SHOWN = 12


def walk_layers(bundle: str, reference: str | None, runtime: str | None) -> LayerReport:
    """Walk a bundle's layers; a culprit outside the gate is written into the current folder.

    Raises:
        MissingDependency: the extra export is not installed.
        SpecError, BundleError: as `deploykit.export.bundle_layers.bundle_layers`.
    """
    from deploykit.optional import require

    require("onnx_ir")
    from deploykit.export.bundle_layers import bundle_layers

    other = None if reference is None else Path(reference)
    return bundle_layers(Path(bundle), other, runtime=runtime, reproducer=_reproducer(bundle))


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
    show(f"{what} {worst.node}{of}, {worst.operator}, which gives {worst.tensor}: {worst.own_db:.1f} dB{reads}.")
    if gate is not None:
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
