"""Verify an opened bundle: its own reference, what its engine gave when exported, and what the user adds."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deploykit.arguments import check_arguments
from deploykit.arrays import ImageArray
from deploykit.backends.runtime import Runtime, run_in_batches
from deploykit.bundle import Status
from deploykit.bundle_status import record_status
from deploykit.errors import SpecError
from deploykit.image_sizes import size_text
from deploykit.loading import load_bundle
from deploykit.names import path_of
from deploykit.parity.baseline import BASELINE_FILE, Baseline, FloatArray, measure_baseline
from deploykit.parity.budget import Budget
from deploykit.parity.reference import REFERENCE_FILE, ParityReference, corner_file
from deploykit.parity.report import MAX_SQNR_DB, PARITY_FILE, LevelParity, ParityReport, simulated
from deploykit.parity.verify import answer_levels, compare_engines, verify_levels
from deploykit.processor import machine_key

if TYPE_CHECKING:
    from deploykit.calibration.images import CalibrationSource

MOST_IMAGES = 64
"""How many of the user's images are used, evenly spaced."""


def verify_bundle(
    folder: str | bytes | os.PathLike[str],
    *,
    device: str = "auto",
    record: bool = False,
    images: CalibrationSource | None = None,
    skip_corrupt: bool = False,
    reference: str | os.PathLike[str] | None = None,
    budget: Budget | None = None,
    threads: int | None = None,
    trust: bool | None = None,
    signed_by: str | os.PathLike[str] | None = None,
) -> ParityReport:
    """Run a bundle's engine on the reference images that it carries and compare with torch's outputs.

    Needs no torch and no weights. The report's ``passed`` says whether every output is within the
    budget that the engine was exported with, and is what the engine gave when it was exported, but for roundings;
    ``raise_for_failures()`` makes it an error. A bundle of version 0.1.0 carries only the budget.

    ``record`` writes what was seen here into the bundle: ``parity_checked`` where every output is within the
    budget and else ``executed``, with the machine, the device and the versions. That is for a bundle that was
    built on a machine without its device. A bundle that is no longer the one that ran is refused.

    Args:
        folder: the bundle.
        device: where the engine runs.
        record: see above.
        images: images that the bundle does not carry, as for ``calibration``; with ``reference`` both engines are
            compared on them, and without it answers are looked for that do not follow the images.
        skip_corrupt: leave unreadable files of ``images`` out with a warning.
        reference: another bundle of the same network, such as its FP32 one, to compare with; on the bundle's own
            images where none are given.
        budget: other limits than those that the bundle was exported with; ``record`` keeps to the bundle's.
        threads: see `load_bundle`.
        trust: see `load_bundle`.
        signed_by: see `load_bundle`; holds for the reference too.

    Raises:
        BundleError: not a bundle, or one that is damaged, or one that cannot be written.
        SpecError: a reference that takes other images or gives other outputs; or ``record`` in a simulator.
        IncompatibleEngine, DeviceUnavailable: the engine cannot run here.
    """
    check_arguments(verify_bundle, locals())
    path = path_of(folder)
    with load_bundle(path, device=device, threads=threads, trust=trust, signed_by=signed_by) as model:
        if record and model.simulator is not None:
            raise SpecError(
                f"record was given, and the engine runs here in {model.simulator}, which says nothing of its device. "
                "Leave record out, or verify the bundle on the device."
            )
        seen_on = model.seen_on()
        verification = Verification(model)
        report = verification.report()
        held = report if budget is None else budget.hold(report, verification.exported())
        within = report.passed
        own = None if images is None else verification.user_images(images, skip_corrupt=skip_corrupt)
        if reference is not None:
            options: dict[str, Any] = {"device": device, "threads": threads, "trust": trust, "signed_by": signed_by}
            with load_bundle(reference, **options) as other:
                further = verification.report_against(other, path_of(reference), own, report)
            report, held = (replace(each, further=(*each.further, further)) for each in (report, held))
        elif own is not None:
            answers = verification.report_answers(own)
            report, held = (replace(each, further=(*each.further, answers)) for each in (report, held))
        baseline = verification.measure() if record and within and verification.baseline is None else None
    if record:
        status: Status = "parity_checked" if within else "executed"
        add = (lambda staging: baseline.save(staging / BASELINE_FILE)) if baseline is not None else _add_nothing
        record_status(path, model.manifest, status, seen_on, add)
    return held


def _add_nothing(staging: Path) -> None:
    """Add no file to a bundle."""


class Verification:
    """An opened engine with what its bundle carries to prove it.

    Raises:
        BundleError: the reference or the baseline is damaged.
    """

    def __init__(self, model: Runtime) -> None:
        self.model = model
        self.machine = machine_key(model.seen_on(), model.threads)
        self.reference = ParityReference.load(model.read_file(REFERENCE_FILE))
        self.images: ImageArray = self.reference.images.astype(model.input_spec.dtype, copy=False)
        kept = BASELINE_FILE in model.manifest.files
        self.baseline = Baseline.load(model.read_file(BASELINE_FILE)) if kept else None
        self._generator = np.random.default_rng(int.from_bytes(os.urandom(8), "little"))

    def report(self) -> ParityReport:
        """Compare the engine with torch, and with what it gave itself when it was exported."""
        levels = verify_levels(
            self.run,
            self.reference,
            self.images,
            self.model.precision,
            self.baseline,
            machine=self.machine,
            generator=self._generator,
        )
        exported = self.exported()
        precision = self.model.precision
        report = replace(
            self._report("torch fp32", len(self.reference), levels),
            min_sqnr_db=precision.min_sqnr_db,
            min_top1_agreement=precision.min_top1_agreement,
        )
        report = replace(report, further=self._corners())
        return report if exported is None else report.with_errors(exported.errors())

    def _corners(self) -> tuple[ParityReport, ...]:
        """Compare the engine with torch at the corners of its range of sizes, where the bundle has references."""
        sizes = self.model.input_spec.sizes
        found = []
        for size in sizes.corners if sizes is not None else ():
            if corner_file(size) in self.model.manifest.files:
                reference = ParityReference.load(self.model.read_file(corner_file(size)))
                levels = verify_levels(
                    self.run,
                    reference,
                    reference.images.astype(self.model.input_spec.dtype, copy=False),
                    self.model.precision,
                    None,
                    machine=self.machine,
                    generator=self._generator,
                )
                report = self._report(f"torch fp32 at {size_text(size)}", len(reference), levels)
                found.append(replace(report, min_sqnr_db=self.model.precision.min_sqnr_db))
        return tuple(found)

    def report_answers(self, images: ImageArray) -> ParityReport:
        """Look for answers that were not computed from images of the user's own."""
        levels = answer_levels(self.run, images, self.baseline, self._generator)
        return self._report("itself, on images of yours", len(images), levels)

    def report_against(
        self, other: Runtime, folder: Path, images: ImageArray | None, own: ParityReport
    ) -> ParityReport:
        """Compare the engine with that of another bundle.

        Args:
            other: the reference.
            folder: the reference's.
            images: of the user's own; None: those of the bundle.
            own: what `report` found.

        Raises:
            SpecError: the two take other images, or give other outputs.
        """
        if (other.input_spec.shape_at(1)[1:], other.input_spec.dtype, other.input_spec.preprocessing) != (
            self.model.input_spec.shape_at(1)[1:],
            self.model.input_spec.dtype,
            self.model.input_spec.preprocessing,
        ):
            raise SpecError(
                f"the reference takes {other.input_spec} and the engine {self.model.input_spec}. "
                "Fix: give a reference that was exported with the same image size and preprocessing."
            )
        chosen = self.images if images is None else images
        kept = PARITY_FILE in other.manifest.files
        its = ParityReport.load(other.read_file(PARITY_FILE)).levels if kept else ()
        expected = {level.name: _together(level, its, other.precision.min_sqnr_db) for level in own.levels}
        levels = compare_engines(self.run, lambda batch: run_in_batches(other, batch), chosen, expected)
        return self._report(f"{other.runtime} {other.precision.name} of {folder}", len(chosen), levels)

    def exported(self) -> ParityReport | None:
        """Return what the bundle says that its engine gave when it was exported; None where it does not."""
        carried = PARITY_FILE in self.model.manifest.files
        return ParityReport.load(self.model.read_file(PARITY_FILE)) if carried else None

    def measure(self) -> Baseline:
        """Measure what the engine gives here, for a bundle that does not carry it."""
        return measure_baseline(self.run, self.images, self.machine)

    def user_images(self, source: CalibrationSource, *, skip_corrupt: bool) -> ImageArray:
        """Read images of the user's own as the engine takes them.

        Raises:
            CalibrationError: nothing to read, or something that cannot be read.
        """
        from deploykit.calibration.images import calibration_set
        from deploykit.images.preprocess import denormalize

        spec = self.model.input_spec
        images = calibration_set(source, spec, skip_corrupt=skip_corrupt).sample(MOST_IMAGES)
        return denormalize(images, spec.preprocessing) if spec.embeds_preprocessing else images

    def run(self, images: ImageArray) -> dict[str, FloatArray]:
        """Give the engine's outputs by name."""
        return run_in_batches(self.model, images)

    def _report(self, reference: str, images: int, levels: tuple[LevelParity, ...]) -> ParityReport:
        if self.model.simulator is not None:
            where = simulated(self.model.simulator)
            levels = tuple(replace(level, measured_on=where) for level in levels)
        return ParityReport(
            reference=reference,
            runtime=self.model.runtime,
            runtime_version=self.model.manifest.runtime_version,
            precision=self.model.precision.name,
            images=images,
            min_sqnr_db=-MAX_SQNR_DB,
            levels=levels,
        )


def _together(level: LevelParity, its: tuple[LevelParity, ...], budget_db: float) -> float:
    """How near two engines should be, each with noise of its own against torch, in dB."""
    other_db = next((each.sqnr_db for each in its if each.name == level.name), budget_db)
    return -10 * math.log10(10 ** (-level.sqnr_db / 10) + 10 ** (-other_db / 10))
