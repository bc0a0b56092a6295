"""The progress of an export: bars on a terminal, one plain line a stage elsewhere; always on stderr."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic
from typing import TYPE_CHECKING

from deploykit.cli.output import stderr_console

if TYPE_CHECKING:
    from deploykit.export.pipeline import Progress

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
    "search": "search the layers to keep in float",
    "speed": "time it in turns with fp32",
}
"""Stages that only some commands have, and so without a number."""

SHORTEST_SECONDS, LONGEST_SECONDS = 2.0, 60.0
"""How far apart the plain lines of a calibration stand: a tenth of the images, but within these times."""


PHASE_WIDTH = 32


@contextmanager
def export_progress() -> Iterator[Progress]:
    """What `export_backbone` reports to; begins with the stage ``load``."""
    show = _bars if stderr_console().is_terminal else _lines
    with show() as progress:
        progress.stage("load")
        yield progress


@contextmanager
def _bars() -> Iterator[Progress]:
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    from deploykit.export.pipeline import Progress

    columns = (TextColumn("{task.description:<34}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Bars(*columns, console=stderr_console(), transient=True) as bars:
        stages = bars.add_task("export", total=len(STAGES))
        images = bars.add_task("calibrate, images", total=None, visible=False)
        build = bars.add_task("build", total=None, visible=False)

        def stage(name: str) -> None:
            done = list(STAGES).index(name) if name in STAGES else None
            bars.update(stages, description=(STAGES | OPTIONAL_STAGES).get(name, name), completed=done)

        def seen(count: int, total: int) -> None:
            bars.update(images, completed=count, total=total, visible=count < total)

        def step(phase: str, done: int, total: int) -> None:
            shown = f"  {phase[:PHASE_WIDTH]}"
            bars.update(build, description=shown, completed=done, total=total, visible=done < total)

        def say(text: str) -> None:
            stderr_console().print(f"  {text}")

        yield Progress(stage=stage, images=seen, step=step, resumed=lambda *at: say(_resuming(*at)), candidate=say)


@contextmanager
def _lines() -> Iterator[Progress]:
    from deploykit.export.pipeline import Progress

    console, start = stderr_console(), monotonic()
    last = (0, start)  # the tenth that was told, and when

    def line(text: str) -> None:
        console.print(f"{monotonic() - start:6.1f} s  {text}", soft_wrap=True)

    def stage(name: str) -> None:
        place = f"[{list(STAGES).index(name) + 1}/{len(STAGES)}] " if name in STAGES else ""
        line(f"{place}{(STAGES | OPTIONAL_STAGES).get(name, name)}")

    def seen(count: int, total: int) -> None:
        nonlocal last
        tenth, now = 10 * count // max(total, 1), monotonic()
        if (
            (tenth > last[0] and now - last[1] >= SHORTEST_SECONDS)
            or now - last[1] >= LONGEST_SECONDS
            or count == total
        ):
            last = (tenth, now)
            line(f"      calibrated {count} of {total} images")

    def say(text: str) -> None:
        line(f"      {text}")

    yield Progress(stage=stage, images=seen, resumed=lambda *at: say(_resuming(*at)), candidate=say)


def _resuming(count: int, total: int) -> str:
    return f"resuming the calibration at image {count} of {total}"
