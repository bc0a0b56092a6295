"""The bars that a terminal shows."""

from __future__ import annotations

import io
import re

import pytest
import torch
from rich.console import Console

from deploykit.calibration import checkpoint, plan
from deploykit.cli import progress as progress_module
from deploykit.progress import BuildStep, CandidateMeasured, ImagesCalibrated, StageStarted, TuningStep
from tests.small_resnet import SMALL


def without_colours(console: Console) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())


def test_a_terminal_shows_the_stage_and_the_images(monkeypatch):
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    monkeypatch.setattr(progress_module, "stderr_console", lambda: console)
    with progress_module.export_progress() as progress:
        progress(StageStarted(name="plan"))
        progress(ImagesCalibrated(done=3, total=8))
        progress(BuildStep(phase="Building engine from a network", done=2, total=5))
        progress(CandidateMeasured(summary="3 layers in float: 21.0 dB"))
        progress(TuningStep(step=20, steps=240, sqnr_db=17.31))
    shown = without_colours(console)
    assert "tune, 17.3 dB held out" in shown
    assert "20/240" in shown
    assert "plan the precision" in shown
    assert "3/8" in shown
    assert "Building engine from a network" in shown
    assert "2/5" in shown
    assert "3 layers in float: 21.0 dB" in shown


def test_the_stages_are_those_of_the_pipeline():
    import inspect

    from deploykit.export import pipeline

    source = inspect.getsource(pipeline.prepare) + inspect.getsource(pipeline.export)
    reported = re.findall(r'progress\(StageStarted\(name="(\w+)"\)\)', source)
    assert list(progress_module.STAGES)[1:] == reported


@pytest.fixture
def told(monkeypatch):
    """What a pipe is told, with a clock that the test moves."""
    console = Console(file=io.StringIO(), force_terminal=False, width=100)
    monkeypatch.setattr(progress_module, "stderr_console", lambda: console)
    clock = [0.0]
    monkeypatch.setattr(progress_module, "monotonic", lambda: clock[0])
    return console.file, clock


def calibrated_lines(told, total: int, seconds_each: float) -> list[str]:
    file, clock = told
    with progress_module.export_progress() as progress:
        for seen in range(1, total + 1):
            clock[0] += seconds_each
            progress(ImagesCalibrated(done=seen, total=total))
    return [line for line in file.getvalue().splitlines() if "calibrated" in line]


@pytest.mark.parametrize(
    ("total", "seconds_each", "least", "most"),
    [(4, 0.1, 1, 1), (60, 0.1, 1, 4), (4096, 0.1, 10, 12), (100_000, 0.1, 160, 180)],
    ids=["a few", "a folder", "thousands", "hours"],
)
def test_a_pipe_is_told_of_folders_of_any_size(told, total, seconds_each, least, most):
    """A line each tenth, none within seconds of the last, one each minute, and always the last."""
    lines = calibrated_lines(told, total, seconds_each)
    assert least <= len(lines) <= most
    assert lines[-1].endswith(f"calibrated {total} of {total} images")


def test_a_terminal_says_where_a_stopped_calibration_goes_on(monkeypatch):
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    monkeypatch.setattr(progress_module, "stderr_console", lambda: console)
    with progress_module.export_progress() as progress:
        progress(ImagesCalibrated(done=1200, total=4096, resumed=True))
        progress(ImagesCalibrated(done=1204, total=4096))
    shown = without_colours(console)
    assert "resuming the calibration at image 1200 of 4096" in shown
    assert "1204/4096" in shown


def test_a_pipe_is_told_of_a_tuning_at_both_ends_and_now_and_then(told):
    """And where a calibration was resumed."""
    file, clock = told
    with progress_module.export_progress() as progress:
        progress(ImagesCalibrated(done=3, total=8, resumed=True))
        for step in range(101):
            clock[0] += 1.0
            progress(TuningStep(step=step, steps=100, sqnr_db=17.0 + step / 100))
    lines = file.getvalue().splitlines()
    assert "resuming the calibration at image 3 of 8" in lines[1]
    assert "tuned 0 of 100 steps, 17.0 dB" in lines[2]
    assert "tuned 100 of 100 steps, 18.0 dB on images held out" in lines[-1]
    assert 4 < len(lines) < 20


@pytest.mark.slow
def test_a_stopped_export_goes_on_calibrating(call, photos, tmp_path, monkeypatch):
    monkeypatch.setenv("DEPLOYKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(checkpoint, "SAVE_SECONDS", 0.0)
    words = ("export", SMALL, "--runtime", "onnxruntime", "--image-size", "64", "--precision", "int8")
    words += ("--calibration", photos, "--no-speed", "-o", tmp_path / "bundle")
    observe, seen = plan._observe, []

    def interrupted(*arguments, **named):
        if len(seen) == 3:
            raise KeyboardInterrupt
        seen.append(True)
        observe(*arguments, **named)

    monkeypatch.setattr(plan, "_observe", interrupted)
    torch.manual_seed(0)  # the export draws random weights, and other weights would start anew
    stopped = call(*words)
    assert (stopped.code, stopped.err.rstrip().endswith("interrupted; nothing was left half-written.")) == (130, True)
    monkeypatch.setattr(plan, "_observe", observe)
    torch.manual_seed(0)
    done = call(*words)
    assert done.code == 0, done.err
    assert "resuming the calibration at image 3 of 4" in done.err
