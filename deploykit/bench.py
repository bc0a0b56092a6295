"""How fast bundles are here: opening, the first result, latency and throughput, in turns."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter

import numpy as np
import numpy.typing as npt

from deploykit.arrays import ImageArray
from deploykit.backends.runtime import Runtime
from deploykit.errors import SpecError
from deploykit.image_sizes import Size, size_text
from deploykit.loading import load_bundle
from deploykit.threads import Hint

SECONDS = 2.0
LEAST_CALLS = 10
TURN = 5
"""Calls of one engine before the next one's turn."""
_STATUS = Path("/proc/self/statm")


@dataclass(frozen=True, kw_only=True)
class BenchResult:
    """Figures of one case: milliseconds, images a second, and bytes; ``image`` is height x width.

    ``load_ms`` is the time to verify and open the bundle, ``first_ms`` that of the first call. Percentiles are of
    single calls, one at a time; ``images_per_s`` is that of a stream with as many runs in flight as the hint gives.
    ``memory_bytes`` is what the process grew by from before the bundle was opened until after its first call; None
    where the system does not say.
    """

    bundle: str
    runtime: str
    precision: str
    device: str
    batch: int
    image: str
    threads: int | None
    hint: Hint
    in_flight: int
    load_ms: float
    first_ms: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    calls: int
    images_per_s: float
    memory_bytes: int | None


def bench(
    bundles: Sequence[str | os.PathLike[str]],
    *,
    batches: Sequence[int] | None = None,
    sizes: Sequence[Size] | None = None,
    threads: Sequence[int] | None = None,
    hint: Hint = "latency",
    seconds: float = SECONDS,
    device: str = "auto",
    trust: bool | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> list[BenchResult]:
    """Time bundles on this machine, in turns, so that a drifting machine changes all of them alike.

    Args:
        bundles: folders that an export wrote.
        batches: images a call; None: what each engine is tuned for.
        sizes: ``(height, width)`` of the images, for engines that take a range; None: what each is tuned for.
        threads: how many threads compute; None: as many as the process may use.
        hint: what the engines are opened for; see `deploykit.load_bundle`.
        seconds: how long each case's latency is measured, and its throughput again, at least.
        device: where they run.
        trust: as for `deploykit.load_bundle`.
        progress: called with each step's name.

    Raises:
        SpecError: a batch or a size that an engine does not take, or a time that is none.
        BundleError, IncompatibleEngine, DeviceUnavailable: a bundle that cannot be opened here.
    """
    if not seconds > 0 or not np.isfinite(seconds):
        raise SpecError(f"seconds is {seconds!r}; expected a time above 0.")
    results: list[BenchResult] = []
    for count in threads or (None,):
        with ExitStack() as opened:
            timed = []
            for bundle in bundles:
                name = Path(bundle).name or str(bundle)
                progress(f"open {name}")
                load = partial(load_bundle, bundle, device=device, threads=count, hint=hint, trust=trust)
                timed.append(_open(name, load, opened))
            for size in sizes or (None,):
                for batch in batches or (None,):
                    results += _one_batch(timed, batch, size, seconds, progress)
    return results


@dataclass(kw_only=True)
class _Timed:
    """An opened engine, and what opening it took."""

    name: str
    model: Runtime
    load_ms: float
    first_ms: float
    memory: int | None


def _open(name: str, load: Callable[[], Runtime], opened: ExitStack) -> _Timed:
    """Open an engine, which closes with ``opened``, and call it once."""
    before, start = _resident(), perf_counter()
    model = opened.enter_context(load())
    loaded = perf_counter()
    images = random_images(model, model.input_spec.best_batch)
    called = perf_counter()
    model(images)
    first_ms, after = 1e3 * (perf_counter() - called), _resident()
    return _Timed(
        name=name,
        model=model,
        load_ms=1e3 * (loaded - start),
        first_ms=first_ms,
        memory=None if before is None or after is None else max(0, after - before),
    )


def _one_batch(
    timed: Sequence[_Timed], batch: int | None, size: Size | None, seconds: float, progress: Callable[[str], None]
) -> list[BenchResult]:
    inputs = [random_images(each.model, _checked_batch(each, batch), size) for each in timed]
    progress(f"latency, batch {batch or 'of each'}{f', {size_text(size)}' if size is not None else ''}")
    times = _latencies([each.model for each in timed], inputs, seconds)
    progress(f"throughput, batch {batch or 'of each'}")
    rates = [throughput(each.model, images, seconds) for each, images in zip(timed, inputs, strict=True)]
    return [
        BenchResult(
            bundle=each.name,
            runtime=each.model.runtime,
            precision=each.model.precision.name,
            device=each.model.device,
            batch=len(images),
            image=size_text(each.model.input_spec.size_of(images.shape)),
            threads=each.model.threads,
            hint=each.model.hint,
            in_flight=each.model.in_flight,
            load_ms=round(each.load_ms, 2),
            first_ms=round(each.first_ms, 3),
            p50_ms=_percentile(own, 50),
            p90_ms=_percentile(own, 90),
            p99_ms=_percentile(own, 99),
            calls=len(own),
            images_per_s=round(rate, 1),
            memory_bytes=each.memory,
        )
        for each, images, own, rate in zip(timed, inputs, times, rates, strict=True)
    ]


def _latencies(
    models: Sequence[Runtime], inputs: Sequence[ImageArray], seconds: float
) -> list[npt.NDArray[np.float64]]:
    """Return the milliseconds of each engine's calls, in turns of a few; the first of a turn warms up."""
    times: list[list[float]] = [[] for _ in models]
    spent = [0.0] * len(models)
    while min(spent) < seconds or min(map(len, times)) < LEAST_CALLS:
        for position, (model, images) in enumerate(zip(models, inputs, strict=True)):
            if spent[position] >= seconds and len(times[position]) >= LEAST_CALLS:
                continue
            model(images)
            for _ in range(TURN):
                start = perf_counter()
                model(images)
                taken = perf_counter() - start
                times[position].append(1e3 * taken)
                spent[position] += taken
    return [np.asarray(each) for each in times]


def throughput(model: Runtime, images: ImageArray, seconds: float) -> float:
    """Return images a second of a stream that goes on for so many seconds."""
    start = perf_counter()

    def frames() -> Iterator[ImageArray]:
        yield images  # one at least, however busy the machine is
        while perf_counter() - start < seconds:
            yield images

    for _ in model.stream([images] * model.in_flight):  # warm: each run in flight has its memory now
        pass
    start = perf_counter()
    count = sum(1 for _ in model.stream(frames()))
    return count * len(images) / (perf_counter() - start)


def _checked_batch(timed: _Timed, batch: int | None) -> int:
    if batch is None:
        return timed.model.input_spec.best_batch
    if not timed.model.input_spec.accepts_batch(batch):
        raise SpecError(
            f"{timed.name} takes a batch of {timed.model.input_spec.batch}, and {batch} was asked for. Export it with "
            "batch_size='dynamic', or leave batches out."
        )
    return batch


def random_images(model: Runtime, batch: int, size: Size | None = None) -> ImageArray:
    """Return images as the engine takes them, with the spread of normalised ones, from a fixed seed.

    Args:
        model: the engine.
        batch: how many.
        size: ``(height, width)``; None: what the engine is tuned for.
    """
    generator = np.random.default_rng(0)
    spec = model.input_spec if size is None else model.input_spec.at(size)
    shape = spec.shape_at(batch)
    if model.input_spec.embeds_preprocessing:
        return generator.integers(0, 256, shape).astype(np.uint8)
    return generator.standard_normal(shape).astype(np.float32)


def _percentile(times: npt.NDArray[np.float64], percent: float) -> float:
    return round(float(np.percentile(times, percent)), 3)


def _resident() -> int | None:
    """Return the bytes of this process that are in memory; None where the system does not say."""
    try:
        return int(_STATUS.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None
