"""One backbone in every combination of runtimes, precisions and recipes: one table, and the best that fits is kept."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from deploykit.backends.backend import Backend
from deploykit.backends.table import engine_names, load_backend
from deploykit.bundle import read_manifest, writing
from deploykit.dataset import Dataset, open_dataset
from deploykit.errors import DeployKitError, DeviceUnavailable, ExportError, ParityError, SpecError, plain_reason
from deploykit.jobs import make_job, shared_images
from deploykit.loading import load_bundle
from deploykit.manifest import engine_parts
from deploykit.options import ExportOptions
from deploykit.places import scratch_folder
from deploykit.progress import Progress, quiet
from deploykit.spec import Batch, Int8, Precision, parse_precision

if TYPE_CHECKING:
    from torch import nn

    from deploykit.backbones.base import BaseBackbone
    from deploykit.calibration.images import CalibrationSource
    from deploykit.export.pipeline import ExportResult

MEGABYTE = 1_000_000


@dataclass(frozen=True, kw_only=True)
class SweepBudget:
    """What the engine that is kept may take; None: no limit.

    ``max_ms`` is a call on this machine, ``max_mb`` the bundle's engine files, ``min_top1`` a share from 0 to 1.
    """

    max_ms: float | None = None
    max_mb: float | None = None
    min_top1: float | None = None

    def __post_init__(self) -> None:
        for name in ("max_ms", "max_mb"):
            limit = getattr(self, name)
            if limit is not None and not limit > 0:
                raise SpecError(f"{name} is {limit}; it must be above 0.")

    def allows(self, entry: SweepEntry) -> bool:
        """Return whether an engine was measured and is within every limit."""
        if entry.problem or entry.ms is None or entry.megabytes is None:
            return False
        enough = self.min_top1 is None or (entry.top1 is not None and entry.top1 >= self.min_top1)
        fast = self.max_ms is None or entry.ms <= self.max_ms
        return enough and fast and (self.max_mb is None or entry.megabytes <= self.max_mb)


@dataclass(frozen=True, kw_only=True)
class SweepEntry:
    """One combination and its figures; None where it was not measured, which ``problem`` explains.

    ``worst_db`` is the SQNR of the worst level against torch FP32; ``top1`` the share of labelled images that are
    right; ``ms`` the median of a call, in turns with the others; ``load_ms`` from the bundle to an open engine.
    """

    name: str
    runtime: str
    precision: str
    recipe: str | None = None
    worst_level: str | None = None
    worst_db: float | None = None
    top1: float | None = None
    ms: float | None = None
    megabytes: float | None = None
    load_ms: float | None = None
    problem: str = ""

    @property
    def quality(self) -> float:
        """The axis of accuracy: top-1 where it was measured, else the worst level's dB."""
        return self.top1 if self.top1 is not None else self.worst_db or 0.0


@dataclass(frozen=True, kw_only=True)
class SweepReport:
    """Every combination of a sweep; ``best`` names the one that was kept in ``folder``, None where none fits."""

    backbone: str
    entries: tuple[SweepEntry, ...]
    best: str | None = None
    folder: str | None = None

    @property
    def frontier(self) -> tuple[str, ...]:
        """The names of those that no other one beats in both speed and accuracy, the fastest first."""
        measured = sorted((e for e in self.entries if e.ms is not None and not e.problem), key=lambda e: e.ms or 0.0)
        names, highest = [], float("-inf")
        for entry in measured:
            if entry.quality > highest:
                names.append(entry.name)
                highest = entry.quality
        return tuple(names)

    def plot(self, path: Path) -> None:
        """Draw accuracy over milliseconds, with the frontier, into a .png or .svg file.

        Raises:
            MissingDependency: matplotlib is not installed.
            SpecError: no combination was measured.
        """
        from deploykit.optional import require

        figure = require("matplotlib.figure").Figure(figsize=(7, 4.5), layout="constrained")
        measured = [entry for entry in self.entries if entry.ms is not None]
        if not measured:
            raise SpecError("nothing was measured, so there is nothing to draw. Leave --plot out.")
        axes = figure.subplots()
        axes.scatter([entry.ms for entry in measured], [entry.quality for entry in measured], color="0.6")
        by_name = {entry.name: entry for entry in measured}
        front = [by_name[name] for name in self.frontier]
        axes.plot([entry.ms for entry in front], [entry.quality for entry in front], marker="o")
        for entry in measured:
            axes.annotate(entry.name, (entry.ms, entry.quality), textcoords="offset points", xytext=(4, 4), fontsize=7)
        labelled = any(entry.top1 is not None for entry in measured)
        axes.set(
            xlabel="milliseconds a call",
            ylabel="top-1" if labelled else "worst level, dB against torch fp32",
            title=self.backbone,
        )
        figure.savefig(path)


@dataclass(frozen=True, kw_only=True)
class Combination:
    """What one engine of a sweep is made with."""

    runtime: str
    precision: Precision

    @property
    def recipe(self) -> str | None:
        """The recipe of an INT8 engine."""
        return self.precision.recipe if isinstance(self.precision, Int8) else None

    @property
    def name(self) -> str:
        """``RUNTIME-PRECISION``, and the recipe where it is not the family's."""
        own = f"-{self.recipe}" if self.recipe not in (None, Int8().recipe) else ""
        return f"{self.runtime}-{self.precision.name}{own}"


def combinations(
    runtimes: Sequence[str] | None,
    precisions: Sequence[str],
    recipes: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
) -> tuple[Combination, ...]:
    """Return every runtime with every precision, and INT8 with every recipe.

    Args:
        runtimes: their names; None: all that are installed.
        precisions: their names.
        recipes: of INT8; empty: the family's.
        settings: of every precision, such as ``min_sqnr_db``.

    Raises:
        SpecError: an unknown name, one without engines, or the same twice.
    """
    names = runtimes if runtimes is not None else _installed()
    made = []
    for runtime in names:
        if not load_backend(runtime).has_engines:
            raise SpecError(f"the {runtime} runtime has no engines to compare. Choose of: {', '.join(engine_names())}.")
        for precision in precisions:
            for recipe in recipes if precision == Int8.name and recipes else (None,):
                chosen = dict(settings or {}) | ({"recipe": recipe} if recipe is not None else {})
                made.append(Combination(runtime=runtime, precision=parse_precision(precision, chosen)))
    keys = [each.name for each in made]
    doubled = next((key for key in keys if keys.count(key) > 1), None)
    if doubled is not None or not made:
        raise SpecError(f"{doubled or 'nothing'} was given{' twice' if doubled else ''}. Give each name once.")
    return tuple(made)


def sweep(
    name: str | nn.Module,
    output: Path,
    tried: Sequence[Combination],
    *,
    calibration: CalibrationSource | None = None,
    validation: str | None = None,
    budget: SweepBudget | None = None,
    batch: Batch = 1,
    backbone: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    progress: Progress = quiet,
) -> SweepReport:
    """Export a backbone in every combination, measure each here, and keep the fastest that fits the budget.

    Args:
        name: as for `deploykit.export_backbone`.
        output: the bundle that is kept.
        tried: from `combinations`.
        calibration: images for INT8, the same for all.
        validation: labelled images; see `deploykit.dataset.open_dataset`. None: engines are judged by dB.
        budget: what the kept engine may take; it is always within its own budget of dB.
        batch: images in a call.
        backbone: options of `deploykit.create_backbone` that say which backbone it is.
        overwrite: replace an existing bundle.
        progress: hears of each export.

    Raises:
        SpecError, CalibrationError, BundleError: what was asked for cannot be done; nothing is built.
        ExportError: no combination gave an engine.
    """
    from deploykit.backbones.build import build_any
    from deploykit.backbones.request import make_request

    labelled = None if validation is None else open_dataset(validation)
    built = build_any(name, make_request(**(backbone or {})))
    calibration = shared_images(calibration, built.input_spec)
    with scratch_folder("sweep") as scratch:
        entries = [_export(built, each, scratch, calibration, batch=batch, progress=progress) for each in tried]
        _check_any(entries)
        entries = _measured(entries, scratch)
        if labelled is not None:
            entries = [_validated(entry, scratch, labelled) for entry in entries]
        best = _fastest(entries, budget or SweepBudget())
        if best is not None:
            _keep(scratch / best.name, output, overwrite=overwrite)
    return SweepReport(
        backbone=built.spec.name,
        entries=tuple(entries),
        best=None if best is None else best.name,
        folder=None if best is None else str(output),
    )


def _check_any(entries: Sequence[SweepEntry]) -> None:
    if all(entry.problem for entry in entries):
        lines = "".join(f"\n  {entry.name}: {entry.problem}" for entry in entries)
        raise ExportError(f"no combination gave an engine within its budget.{lines}")


def _fastest(entries: Sequence[SweepEntry], budget: SweepBudget) -> SweepEntry | None:
    fitting = [entry for entry in entries if budget.allows(entry)]
    return min(fitting, key=lambda entry: (entry.ms or 0.0, entry.megabytes or 0.0), default=None)


def _installed() -> list[str]:
    """Return the runtimes whose engines can be made and run here."""
    backends: list[Backend] = [load_backend(name) for name in engine_names()]
    return [backend.name for backend in backends if backend.installed_version() and backend.load_devices()()]


def _export(
    built: BaseBackbone,
    each: Combination,
    scratch: Path,
    calibration: CalibrationSource | None,
    *,
    batch: Batch,
    progress: Progress,
) -> SweepEntry:
    """Export one combination; what goes wrong with it is in the entry."""
    from deploykit.export.pipeline import export

    entry = SweepEntry(name=each.name, runtime=each.runtime, precision=each.precision.name, recipe=each.recipe)
    options = ExportOptions(runtime=each.runtime, precision=each.precision, batch=batch)
    backend = load_backend(each.runtime)
    if each.precision.name not in backend.precisions:
        return replace(entry, problem=f"it has {', '.join(backend.precisions)}")
    try:
        job = make_job(built, options, calibration)
        result = export(job, scratch / each.name, progress=progress)
    except ParityError as error:
        worst, figure = min(error.levels.items(), key=lambda level: level[1], default=(None, None))
        return replace(entry, worst_level=worst, worst_db=figure, problem="outside its budget")
    except DeployKitError as error:
        return replace(entry, problem=plain_reason(error, limit=120))
    return _with_figures(entry, result)


def _with_figures(entry: SweepEntry, result: ExportResult) -> SweepEntry:
    worst = min(result.parity.levels, key=lambda level: level.sqnr_db)
    manifest = result.manifest
    size = sum(manifest.files[name].size for name in engine_parts(manifest.engine, manifest.files))
    return replace(entry, worst_level=worst.name, worst_db=worst.sqnr_db, megabytes=size / MEGABYTE)


def _measured(entries: Sequence[SweepEntry], scratch: Path) -> list[SweepEntry]:
    """Open every engine, and time them in turns on one batch."""
    from deploykit.export.measure import parity_images
    from deploykit.export.speed import time_in_turns

    opened: dict[str, tuple[Any, float]] = {}
    problems: dict[str, str] = {}
    with ExitStack() as models:
        for entry in entries:
            if entry.problem:
                continue
            try:
                load_bundle(scratch / entry.name, trust=True).close()  # the runtime's own import is not the engine's
                start = perf_counter()
                model = models.enter_context(load_bundle(scratch / entry.name, trust=True))
                opened[entry.name] = model, 1e3 * (perf_counter() - start)
            except DeviceUnavailable:
                problems[entry.name] = "no device here, not timed"
            except DeployKitError as error:
                problems[entry.name] = plain_reason(error, limit=120)
        times: list[float] = []
        if opened:
            engines = [model for model, _ in opened.values()]
            times, _ = time_in_turns(engines, parity_images(None, engines[0].input_spec))
    by_name = dict(zip(opened, times, strict=True))
    return [
        replace(
            entry,
            ms=by_name.get(entry.name),
            load_ms=opened[entry.name][1] if entry.name in opened else None,
            problem=problems.get(entry.name, entry.problem),
        )
        for entry in entries
    ]


def _validated(entry: SweepEntry, scratch: Path, images: Dataset) -> SweepEntry:
    """Count what an engine has right on labelled images."""
    from deploykit.accuracy.evaluation import evaluate

    if entry.problem:
        return entry
    return replace(entry, top1=evaluate(scratch / entry.name, images, trust=True).top1)


def _keep(bundle: Path, output: Path, *, overwrite: bool) -> None:
    """Copy a bundle to where it is kept, whole or not at all."""
    with writing(output, overwrite=overwrite) as staging:
        for name in ("manifest.json", "manifest.sha256", *read_manifest(bundle).files):
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(bundle / name, staging / name)
