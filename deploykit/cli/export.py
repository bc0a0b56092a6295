"""``deploykit export``: a backbone to a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploykit.backends.table import EVALUATOR
from deploykit.cli import export_options as opt
from deploykit.cli.backbone_options import BackboneChoice, takes_backbone
from deploykit.cli.output import JsonFlag, input_text, show, show_json, size_text
from deploykit.labels import LABELS_FILE
from deploykit.options import ExportOptions
from deploykit.spec import DEFAULT_BUILD, BuildOptions, parse_precision

if TYPE_CHECKING:
    from deploykit.cli.export_check import ExportPlan
    from deploykit.export.pipeline import ExportResult

SHOWN_LABELS = 10
"""How many class names of the user's own are printed."""

EXAMPLE = f"Example: deploykit export resnet18 --runtime {EVALUATOR}"


@takes_backbone
def export(
    backbone: BackboneChoice,
    *,
    runtime: opt.RuntimeOption,
    precision: opt.PrecisionOption = opt.DEFAULTS.precision.name,
    batch_size: opt.BatchOption = str(opt.DEFAULTS.batch),
    embed_preprocessing: opt.EmbedFlag = opt.DEFAULTS.embed_preprocessing,
    target: opt.TargetOption = None,
    portable: opt.PortableFlag = False,
    hardware_compatibility: opt.HardwareOption = DEFAULT_BUILD.hardware_compatibility,
    version_compatible: opt.VersionFlag = False,
    timing_cache: opt.TimingOption = None,
    float_dtype: opt.FloatOption = None,
    calibration: opt.CalibrationOption = None,
    skip_corrupt: opt.SkipFlag = False,
    calibrator: opt.CalibratorOption = None,
    recipe: opt.RecipeOption = None,
    recipe_budget: opt.RecipeBudgetOption = None,
    reduce_range: opt.ReduceRangeFlag = None,
    min_sqnr_db: opt.SqnrOption = None,
    min_top1_agreement: opt.AgreementOption = None,
    mixed_precision: opt.MixedFlag = False,
    speed: opt.SpeedFlag = True,
    require_speedup: opt.RequireSpeedupFlag = False,
    output: opt.OutputOption = None,
    overwrite: opt.OverwriteFlag = False,
    dry_run: opt.DryRunFlag = False,
    json: JsonFlag = False,
) -> None:
    """Compile a backbone for a runtime, quantize it where asked, compare it with torch, and write a bundle."""
    settings = opt.settings_of(
        calibrator=calibrator,
        recipe=recipe,
        recipe_budget_s=recipe_budget,
        reduce_range=reduce_range,
        min_sqnr_db=min_sqnr_db,
        min_top1_agreement=min_top1_agreement,
        float_dtype=float_dtype,
        mixed_precision=mixed_precision or None,
    )
    choice = opt.ExportChoice(
        backbone=backbone,
        options=ExportOptions(
            runtime=runtime,
            precision=parse_precision(precision, settings),
            batch=opt.batch_of(batch_size),
            embed_preprocessing=embed_preprocessing,
            target=target,
            portable=portable,
            build=BuildOptions(
                hardware_compatibility=hardware_compatibility,  # type: ignore[arg-type]  # checked by the class
                version_compatible=version_compatible,
                timing_cache=timing_cache,
            ),
            time_against_fp32=speed,
            require_speedup=require_speedup,
        ),
        calibration=tuple(calibration or ()),
        skip_corrupt=skip_corrupt,
        output=Path(output) if output is not None else opt.default_output(backbone.name, runtime, precision),
        overwrite=overwrite,
    )
    _check_and_export(choice, dry_run=dry_run, json=json)


def _check_and_export(choice: opt.ExportChoice, *, dry_run: bool, json: bool) -> None:
    from deploykit.cli.export_check import check_export

    plan = check_export(choice)
    if dry_run:
        show_json({"dry_run": True, "plan": plan}) if json else show(*_planned(plan))
        return
    _report(_export(choice), json=json)


def _export(choice: opt.ExportChoice) -> ExportResult:
    from deploykit.cli.export_check import calibration_source
    from deploykit.cli.progress import export_progress
    from deploykit.facade import export_asked

    with export_progress() as progress:
        return export_asked(
            choice.backbone.name,
            choice.output,
            choice.options,
            backbone=choice.backbone.options,
            calibration=calibration_source(choice.calibration),
            skip_corrupt=choice.skip_corrupt,
            overwrite=choice.overwrite,
            progress=progress,
        )


def _planned(plan: ExportPlan) -> list[str]:
    """Return what a dry run prints."""
    spec = plan.input
    settings = ", ".join(f"{name} {value}" for name, value in plan.settings.items() if value is not None)
    rows: dict[str, Any] = {
        "backbone": f"{plan.backbone.name} ({plan.backbone.family}), weights: {plan.weights}",
        "input": input_text(spec),
        "outputs": ", ".join(plan.outputs),
        "engine": f"{plan.runtime} {plan.runtime_version}" + (f", target {plan.target}" if plan.target else ""),
        "precision": f"{plan.precision}: {settings}",
        "calibration": f"{plan.calibration_images} images" if plan.calibration_images else "none",
        "bundle": plan.output,
    }
    return [
        "Every option is in order. An export would make:",
        *(f"  {name:<12} {value}" for name, value in rows.items()),
        "Nothing was built. Run the same command without --dry-run to build it.",
    ]


def _report(result: ExportResult, *, json: bool) -> None:
    folder, manifest, speed = result.folder, result.manifest, result.speed
    if json:
        told = {"bundle": str(folder), "status": manifest.status, "manifest": manifest, "parity": result.parity}
        show_json(told | {"recipes": result.recipes, "search": result.search, "speed": speed})
        return
    for report in (result.recipes, result.search):
        if report is not None:
            show(report.render())
    size = size_text(sum(record.size for record in manifest.files.values()))
    show(result.parity.render())
    if speed is not None:
        show(speed.sentence())
        if speed.slower:
            show("It is slower than a float engine. What is against it:", *(f"  {line}" for line in speed.reasons()))
    if LABELS_FILE in manifest.files and manifest.backbone.label_set is None:
        names = (folder / LABELS_FILE).read_text(encoding="utf-8").splitlines()
        show(f"Class names: {', '.join(names[:SHOWN_LABELS])}{', ...' if len(names) > SHOWN_LABELS else ''}.")
    show(f"Wrote {folder}: {len(manifest.files)} files, {size}, status {manifest.status}.")
    if manifest.status == "built":
        show(
            f"It was built and never executed: {manifest.runtime} has no device here. "
            f"Copy it to its device, and run there: deploykit verify {folder}"
        )
        return
    show(f"Next: deploykit verify {folder}", f"      deploykit run {folder} IMAGE")
