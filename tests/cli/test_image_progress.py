"""The progress of a run over many images, on a terminal and in a pipe."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from deploykit.cli import image_progress as module
from deploykit.progress import ImagesRun, StageStarted


@pytest.mark.parametrize("terminal", [True, False])
def test_the_last_image_is_told_with_the_rate(monkeypatch, terminal):
    console = Console(file=io.StringIO(), force_terminal=terminal, width=100)
    monkeypatch.setattr(module, "stderr_console", lambda: console)
    with module.image_progress("evaluate") as progress:
        progress(StageStarted(name="trace"))  # of something else
        progress(ImagesRun(done=8, total=8, seconds=0.5))
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())
    assert "evaluate" in shown
    assert ("8/8" if terminal else "8 of 8 images") in shown
    assert "16 images/s" in shown


def test_a_pipe_hears_nothing_between_two_lines(monkeypatch):
    console = Console(file=io.StringIO(), force_terminal=False, width=100)
    monkeypatch.setattr(module, "stderr_console", lambda: console)
    with module.image_progress("extract") as progress:
        for done in range(1, 9):
            progress(ImagesRun(done=done, total=8, seconds=done / 4))
    assert console.file.getvalue().splitlines() == ["extract: 8 of 8 images, 4 images/s"]
