"""The progress of a run over many images: a bar on a terminal, plain lines elsewhere; always on stderr."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic

from deploykit.cli.output import stderr_console
from deploykit.progress import ImagesRun, Progress, ProgressEvent

SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def image_progress(task: str) -> Iterator[Progress]:
    """Give something to report `ImagesRun` to; ``task`` is what it shows, such as ``"evaluate"``."""
    with _bar(task) if stderr_console().is_terminal else _lines(task) as progress:
        yield progress


@contextmanager
def _bar(task: str) -> Iterator[Progress]:
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
    with Bars(*columns, TimeRemainingColumn(), console=stderr_console(), transient=True) as bars:
        images = bars.add_task(task, total=None, rate="")

        def show(event: ProgressEvent) -> None:
            if isinstance(event, ImagesRun):
                bars.update(images, completed=event.done, total=event.total, rate=_rate(event))

        yield show


@contextmanager
def _lines(task: str) -> Iterator[Progress]:
    told = monotonic()

    def show(event: ProgressEvent) -> None:
        nonlocal told
        if isinstance(event, ImagesRun) and (event.done == event.total or monotonic() - told >= SECONDS_BETWEEN_LINES):
            told = monotonic()
            stderr_console().print(f"{task}: {event.done} of {event.total} images, {_rate(event)}", soft_wrap=True)

    yield show


def _rate(event: ImagesRun) -> str:
    return f"{event.done / event.seconds:.0f} images/s" if event.seconds > 0 else ""
