from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from deploykit.calibration import checkpoint
from deploykit.calibration import images as images_module
from deploykit.calibration.images import CalibrationSet, calibration_set
from deploykit.calibration.plan import QuantizationPlan
from deploykit.calibration.plan_cache import PlanCache, PlanKey
from deploykit.calibration.precision import plan_precision
from deploykit.calibration.statistics import Statistics
from deploykit.images.preprocess import read_image
from deploykit.spec import InputSpec, Int8
from deploykit.store import Store, address
from tests.calibration.networks import SIDE

SPEC = InputSpec(height=SIDE, width=SIDE)
STATES = "**/statistics.npz"


class Killed(BaseException):
    pass


@pytest.fixture(autouse=True)
def after_every_batch(monkeypatch):
    monkeypatch.setattr(checkpoint, "SAVE_SECONDS", 0.0)


def images_of(residual) -> CalibrationSet:
    return calibration_set(residual.images, SPEC)


def planned(residual, images: CalibrationSet, cache: PlanCache | None, **callbacks) -> QuantizationPlan:
    plan = plan_precision(
        residual.graph.model,
        Int8(),
        calibration=images,
        probe=residual.images[:1],
        weights_digest="weights",
        cache=cache,
        **callbacks,
    )
    assert isinstance(plan, QuantizationPlan)
    return plan


def stop_at(residual, images: CalibrationSet, cache: PlanCache, stop: int) -> None:
    def heard(seen: int) -> None:
        if seen == stop:
            raise Killed

    with pytest.raises(Killed):
        planned(residual, images, cache, on_image=heard)


def same(one: QuantizationPlan, other: QuantizationPlan) -> bool:
    shifts = all(np.array_equal(one.bias_shift[name], other.bias_shift[name]) for name in other.bias_shift)
    return shifts and (one.ranges, one.statistics, one.images) == (other.ranges, other.statistics, other.images)


def test_a_stopped_calibration_goes_on_to_the_same_plan(residual, tmp_path):
    cache, images = PlanCache(Store(tmp_path)), images_of(residual)
    stop_at(residual, images, cache, 4)
    assert len(list(tmp_path.glob(STATES))) == 1
    seen, resumed = [], []
    plan = planned(residual, images, cache, on_image=seen.append, on_resume=resumed.append)
    assert resumed == [4]
    assert seen == [5, 6]
    assert same(plan, planned(residual, images, None))
    assert not list(tmp_path.glob(STATES))


def test_a_folder_goes_on_without_decoding_what_was_seen(residual, photographs, tmp_path, monkeypatch):
    cache, images = PlanCache(Store(tmp_path)), calibration_set(photographs, SPEC)
    stop_at(residual, images, cache, 5)
    whole = planned(residual, images, None)
    read: list[str] = []
    monkeypatch.setattr(
        images_module, "read_image", lambda path, spec: read.append(path.name) or read_image(path, spec)
    )
    assert same(planned(residual, images, cache), whole)
    assert read == [images.files[-1].name]


def test_a_folder_with_a_corrupt_file_goes_on_at_the_right_image(residual, photographs, tmp_path):
    folder = tmp_path / "photographs"
    folder.mkdir()
    for path in photographs.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "b.jpg").write_bytes(b"not a photograph")
    images = calibration_set(folder, SPEC, skip_corrupt=True)
    cache = PlanCache(Store(tmp_path / "cache"))
    with pytest.warns(UserWarning, match="left out"):
        stop_at(residual, images, cache, 3)
    with pytest.warns(UserWarning, match="left out"):
        assert same(planned(residual, images, cache), planned(residual, images, None))


@pytest.mark.parametrize("content", [b"", b"nonsense", None], ids=["empty", "nonsense", "cut"])
def test_a_damaged_state_is_told_and_the_calibration_starts_anew(content, residual, tmp_path, caplog):
    cache, images = PlanCache(Store(tmp_path)), images_of(residual)
    stop_at(residual, images, cache, 4)
    (state,) = tmp_path.glob(STATES)
    state.write_bytes(state.read_bytes()[:-400] if content is None else content)
    resumed = []
    with caplog.at_level(logging.WARNING):
        plan = planned(residual, images, cache, on_resume=resumed.append)
    assert "is not used and made again" in caplog.text
    assert not resumed
    assert same(plan, planned(residual, images, None))


def test_other_images_or_settings_do_not_go_on(residual, tmp_path):
    cache = PlanCache(Store(tmp_path))
    stop_at(residual, images_of(residual), cache, 4)
    resumed = []
    planned(residual, calibration_set(residual.images[:5], SPEC), cache, on_resume=resumed.append)
    assert not resumed


def test_a_state_of_another_form_starts_anew(residual, tmp_path, caplog):
    store, where = Store(tmp_path), address("calibrations", {})
    store.put(where, lambda folder: (folder / checkpoint.STATISTICS).write_bytes(b"of another version"))
    assert checkpoint.Checkpoint(store, where).started(None).images == 0
    assert "starts anew" in caplog.text
    assert not list(tmp_path.glob(STATES))


def test_a_folder_that_cannot_be_written_is_told_and_stops_nothing(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    kept = checkpoint.Checkpoint(Store(tmp_path / "file"), address("calibrations", {}))
    statistics = Statistics()
    statistics.update(np.ones((1, 3, 4, 4), np.float32), {}, {})
    with caplog.at_level(logging.WARNING):
        kept.keep(statistics)
    assert "cannot be used" in caplog.text


def test_the_state_is_saved_now_and_then(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "SAVE_SECONDS", 5.0)
    now = 100.0
    monkeypatch.setattr(checkpoint, "monotonic", lambda: now)
    kept, statistics = checkpoint.Checkpoint(Store(tmp_path), address("calibrations", {})), Statistics()
    now = 104.0
    kept.keep(statistics)
    assert not list(tmp_path.glob(STATES))
    now = 105.0
    kept.keep(statistics)
    assert list(tmp_path.glob(STATES))


KILLED = """
import os, signal, sys
import numpy as np, onnx_ir as ir
from deploykit.calibration import checkpoint
from deploykit.calibration.images import calibration_set
from deploykit.calibration.plan_cache import PlanCache
from deploykit.calibration.precision import plan_precision
from deploykit.spec import InputSpec, Int8
from deploykit.store import Store
from pathlib import Path

checkpoint.SAVE_SECONDS = 0.0
folder, side = Path(sys.argv[1]), int(sys.argv[2])
images = np.load(folder / "images.npy")

def heard(seen):
    if seen == 3:
        os.kill(os.getpid(), signal.SIGKILL)

plan_precision(
    ir.load(folder / "master.onnx"), Int8(), calibration=calibration_set(images, InputSpec(height=side, width=side)),
    probe=images[:1], weights_digest="weights", cache=PlanCache(Store(folder / "cache")), on_image=heard,
)
"""


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is POSIX")
def test_a_killed_process_loses_no_batch(residual, tmp_path):
    np.save(tmp_path / "images.npy", residual.images)
    ir.save(residual.graph.model, tmp_path / "master.onnx")
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), str(SIDE)], env=os.environ | {"PYTHONPATH": root}, check=False
    )
    assert done.returncode == -signal.SIGKILL
    resumed = []
    cache = PlanCache(Store(tmp_path / "cache"))
    assert len(list(tmp_path.glob(STATES))) == 1
    plan = planned(residual, images_of(residual), cache, on_resume=resumed.append)
    assert resumed == [3]
    assert same(plan, planned(residual, images_of(residual), None))
    key = PlanKey.of(plan.key, residual.graph.model).address("plans").key
    assert (tmp_path / "cache" / "plans" / key).is_dir()
