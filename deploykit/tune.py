"""Measure how an engine is opened best on this machine, and remember it: threads, streams and runs in flight.

Every candidate is timed beside the default in the same rounds, so that a drifting machine changes both alike. The best
one is then timed against the default anew, because the best of several noisy figures flatters; only a gain that is seen
again is kept.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import get_args

import numpy as np

from deploykit.arguments import check_arguments
from deploykit.arrays import ImageArray
from deploykit.backends.backend import Backend, Setting
from deploykit.backends.runtime import LATENCY_IN_FLIGHT, RUNS_AHEAD, Runtime
from deploykit.backends.stream import MOST_IN_FLIGHT
from deploykit.backends.table import backend_of
from deploykit.backends.tuning import Tuning, forget, remember
from deploykit.bench import random_images, throughput
from deploykit.bundle import open_bundle
from deploykit.errors import SpecError
from deploykit.manifest import Manifest
from deploykit.threads import Hint, allowed_processors, checked_hint, thread_limit

ROUNDS = 5
SECONDS = 2.0
LEAST_GAIN = 1.03
"""Below it a gain is not worth a setting: figures of one engine differ by as much from run to run."""

_LEAST_CALLS = 5


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One candidate: its settings, its figure in the result's unit, and how many times better than the default."""

    threads: int | None
    streams: int | None
    in_flight: int
    figure: float
    gain: float


@dataclass(frozen=True, kw_only=True)
class TuningResult:
    """What was measured for one hint.

    ``default`` is the figure of the engine as it opens by itself, in ``unit``: ``ms`` a call or ``images/s``. ``kept``
    is what is remembered; None: the default is best.
    """

    bundle: str
    runtime: str
    device: str
    hint: Hint
    batch: int
    unit: str
    default: float
    trials: tuple[Trial, ...]
    kept: Tuning | None


def tune(
    bundle: str | os.PathLike[str],
    *,
    hints: Sequence[Hint] = ("latency", "throughput"),
    threads: Sequence[int] | None = None,
    streams: Sequence[int] | None = None,
    in_flight: Sequence[int] | None = None,
    seconds: float = SECONDS,
    device: str = "auto",
    trust: bool | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> list[TuningResult]:
    """Measure what is best for an engine here, and remember it for those who open it without ``threads``.

    Args:
        bundle: the folder.
        hints: what for: the shortest call, the most images a second of a stream, or both.
        threads: the numbers of threads to try; None: powers of two, up to what the process may use.
        streams: how many calls share the threads, to try for throughput; None: powers of two.
        in_flight: runs of a stream at a time, to try for throughput; None: as many as streams, and three times as many.
        seconds: how long each candidate is measured, at least.
        device: where the engine runs.
        trust: as for `deploykit.load_bundle`.
        progress: called with each step's name.

    Raises:
        SpecError: a number out of range, or a setting that the runtime does not have.
        BundleError, IncompatibleEngine, DeviceUnavailable: the bundle cannot be opened here.
    """
    check_arguments(tune, locals())
    if not seconds > 0 or not np.isfinite(seconds):
        raise SpecError(f"seconds is {seconds!r}; expected a time above 0.")
    folder = Path(bundle)
    manifest = open_bundle(folder)
    backend = backend_of(manifest)
    asked: dict[Setting, Sequence[int] | None] = {"threads": threads, "streams": streams, "in_flight": in_flight}
    _check_asked(backend, asked)
    results = []
    for hint in map(checked_hint, hints):
        candidates = list(_candidates(hint, backend, asked))
        with ExitStack() as opened:
            progress(f"{hint}: open the engine in {len(candidates) + 1} ways")
            models = [
                opened.enter_context(
                    backend.load_adapter()(manifest, folder, device=device, hint=hint, trust=trust, tuning=each)
                )
                for each in (None, *candidates)
            ]
            results.append(_measured(folder, manifest, models, candidates, seconds=seconds, progress=progress))
            _keep(manifest, backend, {device, models[0].device}, results[-1])
    return results


def forget_tuning(bundle: str | os.PathLike[str], *, device: str = "auto") -> None:
    """Forget what was measured for an engine here, so that it opens by its defaults again.

    Raises:
        BundleError: the bundle is damaged.
    """
    manifest = open_bundle(Path(bundle))
    backend = backend_of(manifest)
    for hint in get_args(Hint):
        for name in {device, "auto", *(backend.load_devices()() if device == "auto" else ())}:
            forget(manifest, backend, name, hint)


def _check_asked(backend: Backend, asked: dict[Setting, Sequence[int] | None]) -> None:
    if not backend.tunable:
        raise SpecError(
            f"the {backend.name} runtime opens an engine in one way: no threads, streams or runs in flight to choose."
        )
    for setting, values in asked.items():
        if values is None:
            continue
        if setting not in backend.tunable:
            raise SpecError(
                f"the {backend.name} runtime has no {setting} to tune; it has {', '.join(backend.tunable)}."
            )
        if not values:
            raise SpecError(f"{setting} is empty; expected the numbers to try.")
        for value in values:
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST_IN_FLIGHT:
                raise SpecError(f"{setting} is {value!r}; expected whole numbers from 1 to {MOST_IN_FLIGHT}.")


def _candidates(hint: Hint, backend: Backend, asked: dict[Setting, Sequence[int] | None]) -> Iterator[Tuning]:
    """Yield what to try: threads for latency; streams that share all threads, and runs in flight, for throughput."""
    most = thread_limit() or len(allowed_processors())
    powers = sorted({most, *(1 << bit for bit in range(most.bit_length()) if 1 << bit <= most)})
    shared = hint == "throughput" and "streams" in backend.tunable
    threads = asked["threads"] or ([most] if shared else powers)
    if hint == "latency":
        for count in threads:
            yield Tuning(hint=hint, threads=count, in_flight=LATENCY_IN_FLIGHT)
        return
    streams: Sequence[int | None] = (asked["streams"] or powers) if shared else [None]
    for count, several in product(threads, streams):
        if several is not None and several > count and asked["streams"] is None:
            continue
        own = several or 1
        runs = asked["in_flight"] or (
            [own, RUNS_AHEAD * own] if "in_flight" in backend.tunable else [LATENCY_IN_FLIGHT]
        )
        for room in runs:
            yield Tuning(hint=hint, threads=count, streams=several, in_flight=room)


def _measured(
    folder: Path,
    manifest: Manifest,
    models: Sequence[Runtime],
    candidates: Sequence[Tuning],
    *,
    seconds: float,
    progress: Callable[[str], None],
) -> TuningResult:
    """Time the default, which is the first of the engines, and the candidates; then the best of them once more."""
    first = models[0]
    images = random_images(first, first.input_spec.best_batch)
    progress(f"{first.hint}: measure {len(candidates)} candidates")
    figures = _rounds(models, images, seconds)
    gains = [_gain(figures[0], own, first.hint) for own in figures[1:]]
    best = max(range(len(candidates)), key=gains.__getitem__)
    kept, unit = None, "ms" if first.hint == "latency" else "images/s"
    if gains[best] >= LEAST_GAIN:
        progress(f"{first.hint}: measure the best once more")
        before, after = _rounds([first, models[best + 1]], images, seconds)
        gain = _gain(before, after, first.hint)
        if gain >= LEAST_GAIN:
            kept = replace(
                candidates[best],
                unit=unit,
                default=round(median(before), 3),
                best=round(median(after), 3),
                gain=round(gain, 3),
            )
    return TuningResult(
        bundle=str(folder),
        runtime=manifest.runtime,
        device=first.device,
        hint=first.hint,
        batch=len(images),
        unit=unit,
        default=round(median(figures[0]), 3),
        trials=tuple(
            Trial(
                threads=each.threads,
                streams=each.streams,
                in_flight=each.in_flight,
                figure=round(median(own), 3),
                gain=round(gain, 3),
            )
            for each, own, gain in zip(candidates, figures[1:], gains, strict=True)
        ),
        kept=kept,
    )


def _rounds(models: Sequence[Runtime], images: ImageArray, seconds: float) -> list[list[float]]:
    """Return the figure of each engine in each round, in which every engine has its turn."""
    figures: list[list[float]] = [[] for _ in models]
    for _ in range(ROUNDS):
        for model, own in zip(models, figures, strict=True):
            figure = _call_ms if model.hint == "latency" else throughput
            own.append(figure(model, images, seconds / ROUNDS))
    return figures


def _call_ms(model: Runtime, images: ImageArray, seconds: float) -> float:
    """Return the median milliseconds of a call; the first warms up."""
    model(images)
    times: list[float] = []
    while sum(times) < seconds or len(times) < _LEAST_CALLS:
        start = perf_counter()
        model(images)
        times.append(perf_counter() - start)
    return 1e3 * median(times)


def _gain(default: Sequence[float], own: Sequence[float], hint: Hint) -> float:
    """Return how many times better figures are than the default's, the median over rounds."""
    pairs = zip(default, own, strict=True)
    return median(before / after if hint == "latency" else after / before for before, after in pairs)


def _keep(manifest: Manifest, backend: Backend, devices: set[str], result: TuningResult) -> None:
    for device in devices:
        if result.kept is None:
            forget(manifest, backend, device, result.hint)
        else:
            remember(manifest, backend, device, result.kept)
