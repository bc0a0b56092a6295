"""What a report says of each bundle: what it says of itself, and what it gives here."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from deploykit.backends.runtime import Runtime
from deploykit.changes.outputs import one_call
from deploykit.changes.sides import Side, read_side
from deploykit.errors import DeviceUnavailable, IncompatibleEngine, MissingDependency, SpecError
from deploykit.loading import load_bundle
from deploykit.optional import require
from deploykit.parity.report import LevelParity, ParityReport
from deploykit.reports.errors import ErrorApart, errors_apart
from deploykit.timing import time_calls
from deploykit.verification import Verification

if TYPE_CHECKING:
    from deploykit.export.layers import LayerReport

BINS = 48


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """Values of one output on the bundle's images: of torch and of the engine, in the same bins.

    ``edges`` are `BINS` + 1 ascending values; both counts have one figure a bin.
    """

    output: str
    edges: tuple[float, ...]
    torch: tuple[int, ...]
    engine: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class BundleFacts:
    """One bundle: ``name`` is unique in the report; what needs a run is None where there was none.

    ``not_run`` says why the engine did not run here; ``layers`` are those of an engine that is an ONNX graph with
    activations in integers, where they were asked for.
    """

    name: str
    side: Side
    here: ParityReport | None = None
    device: str | None = None
    latency_ms: float | None = None
    worst: Histogram | None = None
    not_run: str | None = None
    layers: LayerReport | None = None

    @property
    def levels(self) -> tuple[LevelParity, ...]:
        """Every level, shallow to deep: as it is here, and those inside the network as the export stored them."""
        stored = self.side.parity.levels if self.side.parity is not None else ()
        here = {level.name: level for level in (self.here.levels if self.here is not None else ())}
        return tuple(here.pop(level.name, level) for level in stored) + tuple(here.values())

    @property
    def passed(self) -> bool | None:
        """Whether every output is within the budget, here or else when exported; None: not known."""
        report = self.here or self.side.parity
        return None if report is None else report.passed

    @property
    def worst_db(self) -> float | None:
        """The lowest SQNR of what the engine gives, in dB."""
        outputs = {output.name for output in self.side.manifest.outputs}
        return min((level.sqnr_db for level in self.levels if level.name in outputs), default=None)


@dataclass(frozen=True, kw_only=True)
class Collected:
    """The bundles of a report, and the errors between them."""

    bundles: tuple[BundleFacts, ...]
    errors: tuple[ErrorApart, ...] = ()


def collect(folders: Sequence[Path], *, run: bool, device: str, threads: int | None, trust: bool | None) -> Collected:
    """Read bundles, and run those that can run here: on their own images, and timed in turns.

    Raises:
        BundleError: one is no bundle, or is damaged.
    """
    names = _names(folders)
    facts = [BundleFacts(name=name, side=read_side(folder)) for name, folder in zip(names, folders, strict=True)]
    if not run:
        return Collected(bundles=tuple(replace(each, not_run="not asked for") for each in facts))
    with ExitStack() as stack:
        models: dict[int, Runtime] = {}
        for place, each in enumerate(facts):
            try:
                model = load_bundle(each.side.folder, device=device, threads=threads, trust=trust)
            except (DeviceUnavailable, IncompatibleEngine, MissingDependency) as error:
                facts[place] = replace(each, not_run=str(error))
                continue
            models[place] = stack.enter_context(model)
            facts[place] = _verified(each, model)
        _time(facts, models)
        errors = errors_apart({facts[place].name: model for place, model in models.items()})
    return Collected(bundles=tuple(facts), errors=errors)


def with_layers(collected: Collected) -> Collected:
    """Return the same with each engine's layers, beside itself in float, where it is a graph that can be walked.

    Raises:
        MissingDependency: the extra export is not installed.
    """
    require("onnx_ir")
    return replace(collected, bundles=tuple(replace(each, layers=_layers(each)) for each in collected.bundles))


def _layers(facts: BundleFacts) -> LayerReport | None:
    from deploykit.export.bundle_layers import bundle_layers

    try:
        return bundle_layers(facts.side.folder)
    except SpecError:  # another kind of engine, or one of floats
        return None


def _names(folders: Sequence[Path]) -> list[str]:
    """Return the shortest ends of the paths that tell them apart."""
    paths = [folder.absolute() for folder in folders]
    for depth in range(1, 1 + max(len(path.parts) for path in paths)):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{path} ({place})" for place, path in enumerate(paths, 1)]


def _verified(facts: BundleFacts, model: Runtime) -> BundleFacts:
    verification = Verification(model)
    report = verification.report()
    worst = min(report.levels, key=lambda level: level.sqnr_db).name
    return replace(facts, here=report, device=model.device, worst=_histogram(verification, worst))


def _histogram(verification: Verification, output: str) -> Histogram | None:
    """Count the values of one output; None where the engine's are not finite."""
    reference = verification.reference
    found = reference.sample(verification.run(verification.images))[output]
    expected = reference.expected[output]
    if not np.isfinite(found).all():
        return None
    both = np.concatenate([expected.reshape(-1), found.reshape(-1)])
    edges = np.histogram_bin_edges(both, bins=BINS)
    counts = [np.histogram(values, bins=edges)[0] for values in (expected, found)]
    return Histogram(
        output=output,
        edges=tuple(float(edge) for edge in edges),
        torch=tuple(int(count) for count in counts[0]),
        engine=tuple(int(count) for count in counts[1]),
    )


def _time(facts: list[BundleFacts], models: dict[int, Runtime]) -> None:
    """Put the median milliseconds of an image into the facts of each model."""
    if not models:
        return
    calls, sizes = zip(*(one_call(model) for model in models.values()), strict=True)
    times, _ = time_calls(calls)
    for place, taken, size in zip(models, times, sizes, strict=True):
        facts[place] = replace(facts[place], latency_ms=taken / size)
