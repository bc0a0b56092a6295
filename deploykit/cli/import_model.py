"""``deploykit import``: a model that another tool quantized, as a bundle of any runtime."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deploykit.backends.table import EVALUATOR
from deploykit.cli import backbone_options as backbone
from deploykit.cli import export_options as opt
from deploykit.cli.output import JsonFlag, show, show_json, size_text

if TYPE_CHECKING:
    from deploykit.export.import_quantized import ImportedNetwork
    from deploykit.export.pipeline import ExportResult

EXAMPLE = f"Example: deploykit import quantized.onnx --runtime {EVALUATOR} --images photos"

SHOWN_IGNORED = 5


def import_model(
    model: Annotated[
        str, typer.Argument(metavar="MODEL.onnx", help="A graph with QuantizeLinear and DequantizeLinear.")
    ],
    *,
    runtime: opt.RuntimeChoiceOption,
    images: Annotated[
        str | None,
        typer.Option(
            "--images",
            metavar="FOLDER|FILE",
            help="Images to compare on.",
            show_default="synthetic ones, which show whether the conversion is right",
        ),
    ] = None,
    min_sqnr_db: Annotated[
        float | None,
        typer.Option(
            "--min-sqnr-db",
            metavar="DB",
            help="Budget of each output against MODEL.",
            show_default="20, 12 where weights are rounded anew",
        ),
    ] = None,
    target: opt.OwnTargetOption = None,
    labels: backbone.LabelsOption = None,
    mean: backbone.MeanOption = None,
    std: backbone.StdOption = None,
    interpolation: backbone.InterpolationOption = None,
    crop_pct: backbone.CropPctOption = None,
    crop_mode: backbone.CropModeOption = None,
    output: opt.OutputOption = None,
    overwrite: opt.OverwriteFlag = False,
    json: JsonFlag = False,
) -> None:
    """Take a model that another tool quantized and write it for a runtime, with its scales, zero points and integers.

    Takes what quantize_static of ONNX Runtime, NNCF, ModelOpt and the export of PyTorch's PT2E flow write. The engine
    is compared with MODEL itself, run node by node.
    """
    from deploykit.cli.progress import export_progress
    from deploykit.export.import_quantized import import_quantized

    preprocessing = backbone.preprocessing_of(
        mean=mean, std=std, interpolation=interpolation, crop_pct=crop_pct, crop_mode=crop_mode
    )
    with export_progress() as progress:
        network = import_quantized(model, preprocessing=preprocessing, labels=labels)
        result = network.export(
            output or f"{Path(model).stem}-{runtime}-int8",
            runtime=runtime,
            images=images,
            min_sqnr_db=min_sqnr_db,
            target=target,
            overwrite=overwrite,
            progress=progress,
        )
    _report(network, result, json=json)


def _report(network: ImportedNetwork, result: ExportResult, *, json: bool) -> None:
    placement, manifest = network.plan.placement, result.manifest
    if json:
        told = {"bundle": str(result.folder), "status": manifest.status, "manifest": manifest, "parity": result.parity}
        show_json(told | {"float_nodes": placement.float_nodes, "ignored": network.ignored})
        return
    show(result.parity.render())
    show(f"{len(placement.weights)} layers in integers, {len(placement.float_nodes)} in float.")
    for node, reason in [*placement.float_nodes.items()][:SHOWN_IGNORED]:
        show(f"  in float: {node}: {reason}")
    if network.ignored:
        more = ", ..." if len(network.ignored) > SHOWN_IGNORED else ""
        show(f"Quantizers without a place in the plan: {'; '.join(network.ignored[:SHOWN_IGNORED])}{more}.")
    size = size_text(sum(record.size for record in manifest.files.values()))
    show(f"Wrote {result.folder}: {len(manifest.files)} files, {size}, status {manifest.status}.")
    show(f"Next: deploykit verify {result.folder}")
