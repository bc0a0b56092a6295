"""The bars that a terminal shows."""

from __future__ import annotations

import io

from rich.console import Console

from deploykit.cli import progress as progress_module


def test_a_terminal_shows_the_stage_and_the_images(monkeypatch):
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    monkeypatch.setattr(progress_module, "stderr_console", lambda: console)
    with progress_module.export_progress() as progress:
        progress.stage("plan")
        progress.images(3, 8)
        progress.step("Building engine from a network", 2, 5)
    shown = console.file.getvalue()
    assert "plan the precision" in shown
    assert "3/8" in shown
    assert "Building engine from a network" in shown
    assert "2/5" in shown


def test_the_stages_are_those_of_the_pipeline():
    import inspect
    import re

    from deploykit.export import pipeline

    source = inspect.getsource(pipeline.prepare) + inspect.getsource(pipeline.export)
    reported = re.findall(r'progress\.stage\("(\w+)"\)', source)
    assert list(progress_module.STAGES)[1:] == reported
