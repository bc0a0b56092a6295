"""One export for several targets: the backbone is loaded once, and targets with equal settings share one plan."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploykit.arguments import check_arguments
from deploykit.errors import DeployKitError, ExportError, ParityError, SpecError
from deploykit.export.target_options import export_options
from deploykit.facade import BatchSize
from deploykit.jobs import make_job, shared_images
from deploykit.options import ExportOptions
from deploykit.progress import Progress, quiet
from deploykit.spec import Precision, parse_batch
from deploykit.unset import UNSET, UnsetType

if TYPE_CHECKING:
    from torch import nn

    from deploykit.calibration.images import CalibrationSource
    from deploykit.export.pipeline import ExportResult


def export_targets(
    name: str | nn.Module,
    output: str | os.PathLike[str],
    *,
    targets: Sequence[str],
    runtime: str | UnsetType = UNSET,
    precision: str | Precision | UnsetType = UNSET,
    calibration: CalibrationSource | None = None,
    batch_size: BatchSize | UnsetType = UNSET,
    embed_preprocessing: bool | UnsetType = UNSET,
    overwrite: bool = False,
    skip_corrupt: bool = False,
    time_against_fp32: bool = False,
    require_speedup: bool = False,
    progress: Progress = quiet,
    **options: Any,
) -> dict[str, ExportResult]:
    """Export a backbone for several targets: one bundle for each, in a folder of the target's name.

    Args:
        name: as for `deploykit.export_backbone`, as are all that are not described here; what is given holds for
            every target.
        output: the folder above the bundles.
        targets: names, aliases or TOML files.
        runtime: see above.
        precision: see above.
        calibration: the images, read once.
        batch_size: see above.
        embed_preprocessing: see above.
        overwrite: replace existing bundles, each once the new one is whole.
        skip_corrupt: see above.
        time_against_fp32: for the targets that this machine is.
        require_speedup: refused for a target that this machine is not.
        progress: called with each event, target after target.
        options: which backbone it is.

    Returns:
        What `deploykit.export_backbone` gives, by the target's name.

    Raises:
        SpecError: an unknown target, or two of one name; nothing is built then.
        ParityError, ExportError: a target failed; the message names each, and the others' bundles are written.
    """
    check_arguments(export_targets, locals())
    asked = [
        export_options(
            target,
            runtime=runtime,
            precision=precision,
            batch=UNSET if batch_size is UNSET else parse_batch(batch_size),
            embed_preprocessing=embed_preprocessing,
            time_against_fp32=time_against_fp32,
            require_speedup=require_speedup,
        )
        for target in targets
    ]
    return export_asked_targets(
        name,
        Path(output),
        asked,
        backbone=options,
        calibration=calibration,
        skip_corrupt=skip_corrupt,
        overwrite=overwrite,
        progress=progress,
    )


def export_asked_targets(
    name: str | nn.Module,
    output: Path,
    asked: Sequence[ExportOptions],
    *,
    backbone: Mapping[str, Any],
    calibration: CalibrationSource | None = None,
    skip_corrupt: bool = False,
    overwrite: bool = False,
    progress: Progress = quiet,
) -> dict[str, ExportResult]:
    """Export what both doors ask for, `export_targets` and the command line; see there."""
    from deploykit.backbones.build import build_any
    from deploykit.backbones.request import make_request
    from deploykit.export.pipeline import export

    folders = target_folders(output, asked)
    built = build_any(name, make_request(**backbone))
    pixels = any(options.embed_preprocessing for options in asked)
    spec = built.input_spec.as_pixels() if pixels else built.input_spec
    calibration = shared_images(calibration, spec, skip_corrupt=skip_corrupt)
    jobs = {
        target: make_job(built, options, calibration, skip_corrupt=skip_corrupt)
        for target, options in zip(folders, asked, strict=True)
    }
    results: dict[str, ExportResult] = {}
    failed: dict[str, DeployKitError] = {}
    for target, job in jobs.items():
        try:
            results[target] = export(job, folders[target], overwrite=overwrite, progress=progress)
        except DeployKitError as error:
            failed[target] = error
    if failed:
        raise _failure(failed, tuple(results))
    return results


def target_folders(output: Path, asked: Sequence[ExportOptions]) -> dict[str, Path]:
    """Return the bundle's folder of each target, by the target's name.

    Raises:
        SpecError: two targets of one name.
    """
    names = [str(options.target_name) for options in asked]
    doubled = next((name for name in names if names.count(name) > 1), None)
    if doubled is not None:
        raise SpecError(f"the target {doubled} was given twice, and each has one bundle. Leave one out.")
    return {name: output / name for name in names}


def _failure(failed: Mapping[str, DeployKitError], written: tuple[str, ...]) -> DeployKitError:
    """Return one error that names every target that failed."""
    kind = ParityError if all(isinstance(error, ParityError) for error in failed.values()) else ExportError
    lines = "".join(f"\n  {name}: {error}" for name, error in failed.items())
    kept = f" Written: {', '.join(written)}." if written else " No bundle was written."
    return kind(f"{len(failed)} of {len(failed) + len(written)} targets failed.{kept}{lines}")
