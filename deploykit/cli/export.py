"""``deploykit export``: a backbone to a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from deploykit.backends.table import EVALUATOR
from deploykit.cli import export_options as opt
from deploykit.cli.backbone_options import BackboneChoice, takes_backbone
from deploykit.cli.output import JsonFlag, RayFlag, WorkersOption, input_text, show, show_json, size_text, table
from deploykit.cli.repository import served_lines
from deploykit.errors import SpecError
from deploykit.export.target_options import backend_for, export_options
from deploykit.image_sizes import size_text as pixels_text
from deploykit.labels import LABELS_FILE
from deploykit.parity.report import ELSEWHERE
from deploykit.spec import DEFAULT_BUILD, BuildOptions
from deploykit.unset import UNSET, or_unset

if TYPE_CHECKING:
    from deploykit.cli.export_check import ExportPlan
    from deploykit.export.pipeline import ExportResult
    from deploykit.serving.repository import ServedModel

SHOWN_LABELS = 10
"""How many class names of the user's own are printed."""

_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1}
"""Of a weight in an engine of each precision."""

EXAMPLE = f"Example: deploykit export resnet18 --runtime {EVALUATOR}"


@takes_backbone
def export(
    backbone: BackboneChoice,
    *,
    runtime: opt.RuntimeOption = None,
    precision: opt.PrecisionOption = None,
    batch_size: opt.BatchOption = None,
    embed_preprocessing: opt.EmbedFlag = None,
    target: opt.TargetOption = None,
    portable: opt.PortableFlag = None,
    hardware_compatibility: opt.HardwareOption = DEFAULT_BUILD.hardware_compatibility,
    version_compatible: opt.VersionFlag = False,
    timing_cache: opt.TimingOption = None,
    float_dtype: opt.FloatOption = None,
    calibration: opt.CalibrationOption = None,
    skip_corrupt: opt.SkipFlag = False,
    calibrator: opt.CalibratorOption = None,
    recipe: opt.RecipeOption = None,
    recipe_budget: opt.RecipeBudgetOption = None,
    distill_steps: opt.DistillStepsOption = None,
    distill_minutes: opt.DistillMinutesOption = None,
    distill_for_all: opt.DistillForFlag = False,
    reduce_range: opt.ReduceRangeFlag = None,
    min_sqnr_db: opt.SqnrOption = None,
    min_top1_agreement: opt.AgreementOption = None,
    mixed_precision: opt.MixedFlag = False,
    speed: opt.SpeedFlag = True,
    require_speedup: opt.RequireSpeedupFlag = False,
    ray: RayFlag = False,
    workers: WorkersOption = None,
    output: opt.OutputOption = None,
    overwrite: opt.OverwriteFlag = False,
    layout: opt.LayoutOption = None,
    repository: opt.RepositoryOption = None,
    dry_run: opt.DryRunFlag = False,
    json: JsonFlag = False,
) -> None:
    """Compile a backbone for a runtime, quantize it where asked, compare it with torch, and write a bundle."""
    runtime, precision = opt.lowered(runtime), opt.lowered(precision)
    settings = opt.settings_of(
        calibrator=calibrator,
        recipe=recipe,
        recipe_budget_s=recipe_budget,
        distill_steps=distill_steps,
        distill_minutes=distill_minutes,
        distill_for_runtime=False if distill_for_all else None,
        reduce_range=reduce_range,
        min_sqnr_db=min_sqnr_db,
        min_top1_agreement=min_top1_agreement,
        float_dtype=float_dtype,
        mixed_precision=mixed_precision or None,
    )
    options = tuple(
        export_options(
            name,
            runtime=or_unset(runtime),
            precision=or_unset(precision),
            settings=settings,
            batch=UNSET if batch_size is None else opt.batch_of(batch_size),
            embed_preprocessing=or_unset(embed_preprocessing),
            portable=or_unset(portable),
            build=BuildOptions(
                hardware_compatibility=hardware_compatibility,  # type: ignore[arg-type]  # checked by the class
                version_compatible=version_compatible,
                timing_cache=timing_cache,
            ),
            time_against_fp32=speed,
            require_speedup=require_speedup,
            ray=ray,
            workers=workers,
        )
        for name in map(opt.lowered, target or (None,))
    )
    choice = opt.ExportChoice(
        backbone=backbone,
        options=options,
        calibration=tuple(calibration or ()),
        skip_corrupt=skip_corrupt,
        output=Path(output) if output is not None else opt.default_output(backbone.name, options),
        overwrite=overwrite,
        layout=layout,
        repository=_repository_of(layout, repository),
    )
    _check_and_export(choice, dry_run=dry_run, json=json)


def _check_and_export(choice: opt.ExportChoice, *, dry_run: bool, json: bool) -> None:
    from deploykit.cli.export_check import check_export

    if choice.layout is not None:
        _check_layout(choice, choice.layout)
    plans = check_export(choice, decode=dry_run)
    _check_vacant(choice, plans[0].backbone.name)
    if dry_run:
        whole = {"plan": plans[0]} if len(plans) == 1 else {"plans": plans}
        show_json({"dry_run": True} | whole) if json else show(*(line for plan in plans for line in _planned(plan)))
        return
    if len(plans) > 1:
        _report_several(_export_several(choice), json=json)
        return
    result = _export(choice)
    _report(result, _served(result, choice), json=json)


def _check_layout(choice: opt.ExportChoice, layout: str) -> None:
    """Refuse, before any work, a layout that is none, or whose server does not open the engine."""
    from deploykit.serving.repository import check_layout

    if len(choice.options) > 1:
        raise SpecError(
            f"--layout {layout} is for one target, and {len(choice.options)} were given. Fix: export them, and add "
            "each with deploykit repository, under a --name of its own."
        )
    check_layout(layout, backend_for(choice.options[0]))


def _repository_of(layout: str | None, repository: str | None) -> Path | None:
    if layout is None and repository is not None:
        raise SpecError("--repository is where --layout adds the bundle, and no layout was given. Fix: give both.")
    return None if layout is None else Path(repository or "models")


def _check_vacant(choice: opt.ExportChoice, backbone: str) -> None:
    """Refuse, before any work, a repository that has the model already."""
    from deploykit.serving.repository import check_layout, check_vacant

    if choice.layout is not None and choice.repository is not None:
        layout = check_layout(choice.layout, backend_for(choice.options[0]))
        check_vacant(choice.repository, backbone, layout)


def _served(result: ExportResult, choice: opt.ExportChoice) -> ServedModel | None:
    from deploykit.serving.repository import check_layout, write_repository

    if choice.layout is None or choice.repository is None:
        return None
    layout = check_layout(choice.layout, backend_for(choice.options[0]))
    return write_repository(result.folder, choice.repository, layout=layout)


def _export_several(choice: opt.ExportChoice) -> dict[str, ExportResult]:
    from deploykit.cli.export_check import calibration_source
    from deploykit.cli.progress import export_progress
    from deploykit.several_targets import export_asked_targets

    with export_progress() as progress:
        return export_asked_targets(
            choice.backbone.name,
            choice.output,
            choice.options,
            backbone=choice.backbone.options,
            calibration=calibration_source(choice.calibration),
            skip_corrupt=choice.skip_corrupt,
            overwrite=choice.overwrite,
            progress=progress,
        )


def _export(choice: opt.ExportChoice) -> ExportResult:
    from deploykit.cli.export_check import calibration_source
    from deploykit.cli.progress import export_progress
    from deploykit.facade import export_asked

    with export_progress() as progress:
        return export_asked(
            choice.backbone.name,
            choice.output,
            choice.options[0],
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
    rows: dict[str, object] = {
        "backbone": f"{plan.backbone.name} ({plan.backbone.family}), weights: {plan.weights}",
        "input": input_text(spec),
        "outputs": ", ".join(plan.outputs),
        "engine": f"{plan.runtime} {plan.runtime_version}" + (f", target {plan.target}" if plan.target else ""),
        "precision": f"{plan.precision}: {settings}",
        "calibration": f"{plan.calibration_images} images" if plan.calibration_images else "none",
        "bundle": f"{plan.output}, about {size_text(plan.parameters * _BYTES[plan.precision])} of weights",
    }
    return [
        "Every option is in order. An export would make:",
        *(f"  {name:<12} {value}" for name, value in rows.items()),
        "Nothing was built. Run the same command without --dry-run to build it.",
    ]


def _told(result: ExportResult) -> dict[str, object]:
    """Return what JSON says of an export."""
    manifest = result.manifest
    told = {"bundle": str(result.folder), "status": manifest.status, "manifest": manifest, "parity": result.parity}
    return told | {"recipes": result.recipes, "search": result.search, "speed": result.speed}


def _report_several(results: dict[str, ExportResult], *, json: bool) -> None:
    if json:
        show_json({"targets": {name: _told(result) for name, result in results.items()}})
        return
    rows = []
    for name, result in results.items():
        manifest = result.manifest
        worst = min(result.parity.levels, key=lambda level: level.sqnr_db, default=None)
        size = size_text(sum(record.size for record in manifest.files.values()))
        figure = "not compared" if worst is None else f"{worst.sqnr_db:.1f} ({worst.name})"
        rows.append((name, manifest.runtime, manifest.precision, figure, size, manifest.status, str(result.folder)))
    columns = ("target", "runtime", "precision", "worst level dB", "size", "status", "bundle")
    show(table(columns, rows, right=("size",)))
    show("Next: copy each bundle to its device, and run there: deploykit verify BUNDLE --record")


def _report(result: ExportResult, served: ServedModel | None, *, json: bool) -> None:
    folder, manifest, speed = result.folder, result.manifest, result.speed
    if json:
        show_json(_told(result) | ({"served": served} if served is not None else {}))
        return
    for report in (result.recipes, result.search):
        if report is not None:
            show(report.render())
    size = size_text(sum(record.size for record in manifest.files.values()))
    show(result.parity.render(), *result.parity.further_lines())
    if manifest.input.sizes is not None and manifest.precision == "int8":
        show(f"The plan was calibrated at {pixels_text(manifest.input.sizes.best)}, the best size of the range.")
    if speed is not None:
        show(speed.sentence())
        if speed.slower:
            show("It is slower than a float engine. What is against it:", *(f"  {line}" for line in speed.reasons()))
    if LABELS_FILE in manifest.files and manifest.backbone.label_set is None:
        names = (folder / LABELS_FILE).read_text(encoding="utf-8").splitlines()
        show(f"Class names: {', '.join(names[:SHOWN_LABELS])}{', ...' if len(names) > SHOWN_LABELS else ''}.")
    show(f"Wrote {folder}: {len(manifest.files)} files, {size}, status {manifest.status}.")
    if served is not None:
        show(*served_lines(served))
    if manifest.status == "built":
        show(f"{_why_built(result)} Copy it to its device, and run there: deploykit verify {folder} --record")
        return
    show(f"Next: deploykit verify {folder}", f"      deploykit run {folder} IMAGE")


def _why_built(result: ExportResult) -> str:
    """Say why an engine has no higher status than built."""
    manifest = result.manifest
    if manifest.made_for is not None and any(level.measured_on == ELSEWHERE for level in result.parity.levels):
        return f"It is for {manifest.made_for.title}, and was compared here, on another machine."
    if manifest.made_for is not None and "simulator" in manifest.seen_on:
        simulator = manifest.seen_on["simulator"]
        return f"It is for {manifest.made_for.title}, and was compared here in {simulator}, never on the device."
    return f"It was built and never executed: {manifest.runtime} has no device here."
