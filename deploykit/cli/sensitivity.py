"""``deploykit sensitivity``: how much noise each layer makes in INT8, before anything is built."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deploykit.backends.table import EVALUATOR
from deploykit.cli import export_options as opt
from deploykit.cli.backbone_options import BackboneChoice, takes_backbone
from deploykit.cli.output import JsonFlag, show, show_json, table
from deploykit.options import ExportOptions
from deploykit.spec import Int8, parse_precision

if TYPE_CHECKING:
    from deploykit.calibration.sensitivity import Sensitivity

EXAMPLE = "Example: deploykit sensitivity resnet18 --calibration photos"

SHOWN_NODES = 12


@takes_backbone
def sensitivity(
    backbone: BackboneChoice,
    *,
    runtime: opt.RuntimeChoiceOption = EVALUATOR,
    calibration: opt.CalibrationOption = None,
    skip_corrupt: opt.SkipFlag = False,
    calibrator: opt.CalibratorOption = None,
    recipe: opt.RecipeOption = None,
    shown: Annotated[
        int, typer.Option("--nodes", min=1, help="Rows of the table, the noisiest layers first.")
    ] = SHOWN_NODES,
    plot: Annotated[
        str | None, typer.Option("--plot", metavar="FILE", help="Draw all layers into a .png or .svg file.")
    ] = None,
    cures: Annotated[
        bool,
        typer.Option("--cures", help="Try what could be done against the noise, and show what each gives (minutes)."),
    ] = False,
    json: JsonFlag = False,
) -> None:
    """Quantize one layer at a time to int8 and show what each costs the outputs, in dB against fp32."""
    settings = opt.settings_of(calibrator=calibrator, recipe=recipe)
    if plot is not None:
        from deploykit.optional import require

        require("matplotlib.figure")
    found = _measure(
        backbone,
        runtime=runtime,
        precision=parse_precision("int8", settings),
        calibration=tuple(calibration or ()),
        skip_corrupt=skip_corrupt,
        cures=cures,
    )
    if plot is not None:
        found.plot(Path(plot))
    if json:
        show_json({"sensitivity": found, "shares": found.shares()})
        return
    _show(found, shown)
    words = f"{backbone.name} --runtime {runtime} --precision int8 --mixed-precision --calibration ..."
    show(f"Next: deploykit export {words}")


def _measure(
    chosen: BackboneChoice,
    *,
    runtime: str,
    precision: object,
    calibration: tuple[str, ...],
    skip_corrupt: bool,
    cures: bool,
) -> Sensitivity:
    from deploykit.calibration.images import calibration_set
    from deploykit.cli.export_check import calibration_source
    from deploykit.cli.progress import export_progress
    from deploykit.export.job import ExportJob
    from deploykit.export.sensitivity import sensitivity as measure
    from deploykit.facade import create_backbone

    assert isinstance(precision, Int8)  # noqa: S101  (the caller parsed "int8"; narrows the type)
    with export_progress() as progress:
        backbone: Any = create_backbone(chosen.name, **chosen.options)
        source = calibration_source(calibration)
        images = None
        if source is not None:
            images = calibration_set(source, backbone.input_spec, skip_corrupt=skip_corrupt)
        options = ExportOptions(runtime=runtime, precision=precision)
        return measure(ExportJob(backbone=backbone, options=options, images=images), cures=cures, progress=progress)


def _show(found: Sensitivity, shown: int) -> None:
    shares = found.shares()
    outputs = list(found.together_db)
    columns = ("layer", "operator", "MMACs", *outputs, "weights", "activations", "share of noise")
    rows = [
        [entry.layer, entry.operator, f"{entry.macs / 1e6:.3g}"]
        + [_decibels(entry.sqnr_db[output]) for output in outputs]
        + [_decibels(entry.weights_db), _decibels(entry.activations_db)]
        + [f"{shares[entry.node]:.1%}"]
        for entry in found.nodes[:shown]
    ]
    rest = sum(shares[entry.node] for entry in found.nodes[shown:])
    if len(found.nodes) > shown:
        rows.append([f"{len(found.nodes) - shown} more", "", "", *("" for _ in outputs), "", "", f"{rest:.1%}"])
    parts = [_decibels(min(each.values())) for each in (found.weights_db, found.activations_db)]
    rows.append(["all of them", "", "", *(_decibels(found.together_db[output]) for output in outputs), *parts, ""])
    title = f"SQNR in dB of each output with one layer in int8, against fp32, {found.images} images"
    show(table(columns, rows, right=columns[2:], title=title))
    if found.cures:
        tried = [[each.name, _decibels(each.worst_db), f"{each.gain_db:+.1f}", each.how] for each in found.cures]
        headings = ("what was tried", "worst output dB", "gain dB", "export with")
        show(table(headings, tried, right=headings[1:3], title="All layers in int8, as far as not said otherwise"))


def _decibels(value: float) -> str:
    return "exact" if value >= 120 else f"{value:.1f}"
