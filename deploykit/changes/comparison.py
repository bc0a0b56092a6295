"""Compare two bundles, such as the last release's and the new one, with tolerances."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from deploykit.arguments import check_arguments
from deploykit.changes.differences import Difference, contract_differences, making_differences
from deploykit.changes.outputs import Ran, run_both
from deploykit.changes.plans import plan_differences
from deploykit.changes.rows import Gates, LevelChange, Measure, level_changes, measures
from deploykit.changes.sides import Side, read_side, same_plan
from deploykit.changes.tolerances import Tolerances, expected_between
from deploykit.errors import ParityError, SpecError
from deploykit.loading import load_bundle
from deploykit.names import path_of
from deploykit.spec import parse_precision

DEFAULT = Tolerances()


@dataclass(frozen=True, kw_only=True)
class BundleComparison:
    """Two bundles side by side.

    ``images`` is on how many images both engines ran, 0 where neither did; ``expected_between_db`` is how near their
    outputs had to be, None: no gate. ``contract`` are differences that an application notices, ``making`` those in
    how the bundles were made. ``failures`` say in words what is outside the tolerances, ``notes`` what is near them.
    """

    old: str
    new: str
    images: int
    tolerances: Tolerances
    expected_between_db: float | None
    contract: tuple[Difference, ...]
    making: tuple[Difference, ...]
    levels: tuple[LevelChange, ...]
    measures: tuple[Measure, ...]
    failures: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether everything is within the tolerances."""
        return not self.failures

    def raise_for_failures(self) -> None:
        """Do nothing when `passed`.

        Raises:
            ParityError: names everything that is outside the tolerances.
        """
        if self.failures:
            lines = "".join(f"\n  {failure}" for failure in self.failures)
            raise ParityError(
                f"{self.new} differs from {self.old} by more than is allowed:{lines}\n"
                "Allow what was meant to change, or export again."
            )


def compare_bundles(
    old: str | os.PathLike[str],
    new: str | os.PathLike[str],
    *,
    images: Sequence[str | os.PathLike[str]] | None = None,
    tolerances: Tolerances = DEFAULT,
    run: bool = True,
    device: str = "auto",
    threads: int | None = None,
    trust: bool | None = None,
) -> BundleComparison:
    """Compare two bundles: what they promise, how they were made, their numbers, their latency and their size.

    Args:
        old: the last release's bundle.
        new: the one that may replace it.
        images: image files to run both on; None: the reference images that a bundle carries.
        tolerances: what fails.
        run: run both engines here; False compares what the bundles say of themselves, for a machine without their
            device.
        device: where both run.
        threads: as for `deploykit.loading.load_bundle`.
        trust: as for `deploykit.loading.load_bundle`.

    Raises:
        BundleError: either is no bundle, or is damaged.
        SpecError: images, and ``run`` is False; or an empty list of images.
        IncompatibleEngine, DeviceUnavailable: an engine cannot run here.
        ParityError: the old engine gives NaN or infinity.
        ImageError: an image file cannot be read.
    """
    check_arguments(compare_bundles, locals())
    files = None if images is None else [Path(os.fsdecode(each)) for each in images]
    if files is not None and (not run or not files):
        raise SpecError("images were given that nothing runs on" if files else "the list of images is empty.")
    sides = read_side(path_of(old)), read_side(path_of(new))
    ran = Ran()
    if run:
        with ExitStack() as stack:
            models = [
                stack.enter_context(load_bundle(side.folder, device=device, threads=threads, trust=trust))
                for side in sides
            ]
            ran = run_both(models[0], models[1], files)
    return _compared(sides[0], sides[1], ran, tolerances)


def _compared(old: Side, new: Side, ran: Ran, tolerances: Tolerances) -> BundleComparison:
    contract = tuple(contract_differences(old.manifest, new.manifest, (old.labels, new.labels)))
    expected = tolerances.min_sqnr_db
    if expected is None:
        expected = expected_between(old.manifest, new.manifest, same_plan=same_plan(old, new))
    gates = Gates(
        drop_db=tolerances.allowed_drop(old.manifest, new.manifest),
        budget_db=parse_precision(new.manifest.precision, new.manifest.precision_settings).min_sqnr_db,
        between_db=expected,
        agreement=tolerances.min_top1_agreement,
    )
    levels = tuple(level_changes(old, new, ran, gates))
    sized = tuple(measures(old, new, ran, tolerances))
    _check_measured(tolerances, levels, sized)
    failures = [] if levels else ["no level was compared: neither bundle stores any"]
    failures += [
        f"{each.what}: {each.new}; it was {each.old}" for each in contract if each.contract not in tolerances.allow
    ]
    failures += [f"{level.name}: {fault}" for level in levels for fault in level.failures]
    failures += [
        f"{each.name}: {each.ratio:.2f} times the old one's; allowed {each.limit:g}"
        for each in sized
        if not each.passed
    ]
    return BundleComparison(
        old=str(old.folder),
        new=str(new.folder),
        images=ran.images,
        tolerances=tolerances,
        expected_between_db=expected,
        contract=contract,
        making=(*making_differences(old.manifest, new.manifest), *plan_differences(old.plan, new.plan)),
        levels=levels,
        measures=sized,
        failures=tuple(failures),
        notes=tuple(f"{level.name}: {note}" for level in levels for note in level.notes),
    )


def _check_measured(tolerances: Tolerances, levels: Sequence[LevelChange], sized: Sequence[Measure]) -> None:
    """Refuse a tolerance that was given and that there is no figure for, in place of passing it.

    Raises:
        SpecError: names each.
    """
    measured = {
        "max_drop_db": any(level.drop_db is not None for level in levels),
        "min_sqnr_db": any(level.between_db is not None for level in levels),
        "min_top1_agreement": any(level.agreement is not None for level in levels),
        "max_slowdown": any(each.unit == "ms" for each in sized),
    }
    idle = [name for name, known in measured.items() if not known and getattr(tolerances, name) is not None]
    if idle:
        raise SpecError(
            f"{', '.join(idle)} was given, and these two bundles have nothing that it is of: outputs, logits, latency "
            "or stored figures of both. Fix: run both engines, on images that both take, or leave it out."
        )
