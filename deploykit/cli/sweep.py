"""``deploykit sweep``: a backbone in every combination of runtimes and precisions, and the best that fits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deploykit.backends.table import engine_names
from deploykit.cli import export_options as opt
from deploykit.cli.backbone_options import BackboneChoice, option, takes_backbone
from deploykit.cli.exit_codes import DRIFT
from deploykit.cli.output import JsonFlag, check_plot, show, show_json, table
from deploykit.errors import SpecError
from deploykit.spec import PRECISIONS

if TYPE_CHECKING:
    from deploykit.sweep import SweepEntry, SweepReport

EXAMPLE = "Example: deploykit sweep resnet18 --precisions fp32,fp16 --max-ms 20"

_SWEEP, _BUDGET, _BUNDLE = "Sweep", "Budget", "Output"


@takes_backbone
def sweep(
    backbone: BackboneChoice,
    *,
    runtimes: Annotated[
        str | None,
        option(
            "--runtimes",
            panel=_SWEEP,
            metavar=",".join(engine_names()),
            default="all that run here",
            help="The runtimes, with commas between them.",
        ),
    ] = None,
    precisions: Annotated[
        str,
        option(
            "--precisions", panel=_SWEEP, metavar=",".join(PRECISIONS), help="The precisions; int8 needs --calibration."
        ),
    ] = "fp32,int8",
    recipes: Annotated[
        str | None,
        option(
            "--recipes", panel=_SWEEP, metavar="NAME,NAME", default="the family's", help="Also int8 in these recipes."
        ),
    ] = None,
    batch_size: opt.BatchOption = None,
    calibration: opt.CalibrationOption = None,
    validation: Annotated[
        str | None,
        option(
            "--validation",
            panel=_SWEEP,
            metavar="FOLDER",
            default="none: judged by dB",
            help="Labelled images: one subfolder a class, a .csv or .tsv file, or a .npz file.",
        ),
    ] = None,
    min_sqnr_db: opt.SqnrOption = None,
    max_ms: Annotated[
        float | None,
        option("--max-ms", panel=_BUDGET, default="no limit", help="What a call of the kept engine may take here."),
    ] = None,
    max_mb: Annotated[
        float | None, option("--max-mb", panel=_BUDGET, default="no limit", help="What its files may take, in MB.")
    ] = None,
    min_top1: Annotated[
        float | None,
        option(
            "--min-top1", panel=_BUDGET, default="no limit", help="What it must have right of --validation, 0 to 1."
        ),
    ] = None,
    plot: Annotated[
        str | None,
        option("--plot", panel=_BUNDLE, metavar="FILE", default="none", help="Draw the frontier into a .png or .svg."),
    ] = None,
    output: Annotated[
        str | None,
        option("--output", "-o", panel=_BUNDLE, metavar="FOLDER", default="NAME-best", help="The bundle that is kept."),
    ] = None,
    overwrite: opt.OverwriteFlag = False,
    json: JsonFlag = False,
) -> None:
    """Export every combination, measure all in one run, show one table, and keep the fastest within the budget."""
    from deploykit.cli.export_check import calibration_source, check_output
    from deploykit.cli.progress import export_progress
    from deploykit.sweep import SweepBudget, combinations
    from deploykit.sweep import sweep as measure_all

    if min_top1 is not None and (validation is None or not 0 <= min_top1 <= 1):
        raise SpecError(f"--min-top1 is {min_top1:g}; give a share from 0 to 1, and labelled images with --validation.")
    if plot is not None:
        check_plot(plot)
    tried = combinations(
        None if runtimes is None else _listed(runtimes, "--runtimes"),
        _listed(precisions, "--precisions"),
        _listed(recipes, "--recipes") if recipes is not None else (),
        opt.settings_of(min_sqnr_db=min_sqnr_db),
    )
    folder = Path(output) if output is not None else Path(f"{backbone.name.replace('/', '-')}-best")
    check_output(folder, overwrite=overwrite)
    with export_progress() as progress:
        report = measure_all(
            backbone.name,
            folder,
            tried,
            calibration=calibration_source(tuple(calibration or ())),
            validation=validation,
            budget=SweepBudget(max_ms=max_ms, max_mb=max_mb, min_top1=min_top1),
            batch=opt.batch_of(batch_size or "1"),
            backbone=backbone.options,
            overwrite=overwrite,
            progress=progress,
        )
    show_json({"sweep": report, "frontier": report.frontier}) if json else _show(report)
    if plot is not None:
        report.plot(Path(plot))
    if report.best is None:
        raise typer.Exit(DRIFT)


def _listed(text: str, name: str) -> list[str]:
    words = [word.strip() for word in text.split(",")]
    if not all(words):
        raise SpecError(f"{name} is {text!r}; expected names with commas between them.")
    return words


def _show(report: SweepReport) -> None:
    labelled = any(entry.top1 is not None for entry in report.entries)
    figures = ("worst level dB", *(["top-1"] if labelled else []), "ms", "MB", "load ms")
    rows = [_row(entry, report, labelled=labelled) for entry in report.entries]
    title = f"{report.backbone}: every combination, in turns on this machine"
    show(table(("engine", *figures, "frontier", "note"), rows, right=figures, title=title))
    if report.best is None:
        show("No engine is within the budget, so none was kept. Raise --max-ms or --max-mb, or lower --min-top1.")
        return
    show(f"Kept {report.best} in {report.folder}: the fastest within the budget.")
    show(f"Next: deploykit verify {report.folder}")


def _row(entry: SweepEntry, report: SweepReport, *, labelled: bool) -> list[str]:
    worst = "" if entry.worst_db is None else f"{entry.worst_db:.1f} ({entry.worst_level})"
    top1 = [_figure(None if entry.top1 is None else 100 * entry.top1, "%")] if labelled else []
    note = entry.problem or ("kept" if entry.name == report.best else "")
    times = [_figure(entry.ms), _figure(entry.megabytes), _figure(entry.load_ms)]
    return [entry.name, worst, *top1, *times, "yes" if entry.name in report.frontier else "", note]


def _figure(value: float | None, unit: str = "") -> str:
    return "" if value is None else f"{value:.2f}{unit}"
