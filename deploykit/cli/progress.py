"""The progress of an export: bars on a terminal, one plain line a stage elsewhere; always on stderr."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic

from deploykit.cli.output import stderr_console
from deploykit.progress import (
    BuildStep,
    CandidateMeasured,
    ImagesCalibrated,
    Progress,
    ProgressEvent,
    StageStarted,
    TuningStep,
)

STAGES: dict[str, str] = {
    "load": "load the backbone and its weights",
    "trace": "trace the module",
    "fuse": "fuse",
    "to_onnx": "write the master ONNX graph",
    "plan": "plan the precision",
    "render": "render the runtime's dialect",
    "lower": "build the engine",
    "parity": "compare with torch",
    "bundle": "write the bundle",
}
"""The stages of `deploykit.export.pipeline` in their order, after the one that comes before it."""

OPTIONAL_STAGES: dict[str, str] = {
    "recipes": "try recipes on images held out",
    "sensitivity": "quantize one layer at a time",
    "cures": "try what could be done against the noise",
    "conversion": "prove the fp32 conversion",
    "distill": "tune the plan on the images",
    "search": "search the layers to keep in float",
    "speed": "time it in turns with fp32",
}
"""Stages that only some commands have, and so without a number."""

SHORTEST_SECONDS, LONGEST_SECONDS = 2.0, 60.0
"""How far apart the plain lines of a calibration stand: a tenth of the images, but within these times."""

PHASE_WIDTH = 32


@contextmanager
def export_progress() -> Iterator[Progress]:
    """Give `export_backbone` something to report to; begins with the stage ``load``."""
    show = _bars if stderr_console().is_terminal else _lines
    with show() as progress:
        progress(StageStarted(name="load"))
        yield progress


@contextmanager
def _bars() -> Iterator[Progress]:
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description:<34}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Bars(*columns, console=stderr_console(), transient=True) as bars:
        stages = bars.add_task("export", total=len(STAGES))
        images = bars.add_task("calibrate, images", total=None, visible=False)
        build = bars.add_task("build", total=None, visible=False)
        tuning = bars.add_task("tune", total=None, visible=False)

        def show(event: ProgressEvent) -> None:
            match event:
                case StageStarted(name=name):
                    done = list(STAGES).index(name) if name in STAGES else None
                    bars.update(stages, description=(STAGES | OPTIONAL_STAGES).get(name, name), completed=done)
                case ImagesCalibrated(done=done, total=total, resumed=True):
                    stderr_console().print(f"  {_resuming(done, total)}")
                case ImagesCalibrated(done=done, total=total):
                    bars.update(images, completed=done, total=total, visible=done < total)
                case BuildStep(phase=phase, done=done, total=total):
                    shown = f"  {phase[:PHASE_WIDTH]}"
                    bars.update(build, description=shown, completed=done, total=total, visible=done < total)
                case CandidateMeasured(summary=summary):
                    stderr_console().print(f"  {summary}")
                case TuningStep(step=step, steps=steps, sqnr_db=sqnr):
                    shown = f"  tune, {sqnr:.1f} dB held out"
                    bars.update(tuning, description=shown, completed=step, total=steps, visible=step < steps)

        yield show


@contextmanager
def _lines() -> Iterator[Progress]:
    yield _Lines().show


class _Lines:
    """Plain lines with the seconds since the start, for a pipe or a log."""

    def __init__(self) -> None:
        self._start = monotonic()
        self._tenth, self._told = 0, self._start

    def show(self, event: ProgressEvent) -> None:
        """Print an event's line; the steps of a build have none."""
        match event:
            case StageStarted(name=name):
                place = f"[{list(STAGES).index(name) + 1}/{len(STAGES)}] " if name in STAGES else ""
                self._line(f"{place}{(STAGES | OPTIONAL_STAGES).get(name, name)}")
            case ImagesCalibrated(done=done, total=total, resumed=True):
                self._line(f"      {_resuming(done, total)}")
            case ImagesCalibrated(done=done, total=total):
                self._images(done, total)
            case CandidateMeasured(summary=summary):
                self._line(f"      {summary}")
            case TuningStep(step=step, steps=steps, sqnr_db=sqnr):
                self._tuning(step, steps, sqnr)

    def _images(self, done: int, total: int) -> None:
        tenth, now = 10 * done // max(total, 1), monotonic()
        quiet_for = now - self._told
        if (tenth > self._tenth and quiet_for >= SHORTEST_SECONDS) or quiet_for >= LONGEST_SECONDS or done == total:
            self._tenth, self._told = tenth, now
            self._line(f"      calibrated {done} of {total} images")

    def _tuning(self, step: int, steps: int, sqnr_db: float) -> None:
        now = monotonic()
        if step in (0, steps) or now - self._told >= LONGEST_SECONDS / 4:
            self._told = now
            self._line(f"      tuned {step} of {steps} steps, {sqnr_db:.1f} dB on images held out")

    def _line(self, text: str) -> None:
        stderr_console().print(f"{monotonic() - self._start:6.1f} s  {text}", soft_wrap=True)


def _resuming(count: int, total: int) -> str:
    return f"resuming the calibration at image {count} of {total}"
