"""Every combination in one run: figures for each, the frontier, and the best that fits kept whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from deploykit.bundle import open_bundle
from deploykit.errors import ExportError, SpecError
from deploykit.sweep import SweepBudget, SweepEntry, SweepReport, combinations, sweep
from tests.test_several_targets import Tiny


def entry(name: str, ms: float | None, db: float, **figures) -> SweepEntry:
    return SweepEntry(name=name, runtime="a", precision="fp32", ms=ms, worst_db=db, megabytes=1.0, **figures)


def test_combinations_are_every_runtime_with_every_precision_and_recipe():
    made = combinations(["onnxruntime", "openvino"], ["fp32", "int8"], ["fast", "adaptive"])
    assert [each.name for each in made] == [
        *("onnxruntime-fp32", "onnxruntime-int8-fast", "onnxruntime-int8-adaptive"),
        *("openvino-fp32", "openvino-int8-fast", "openvino-int8-adaptive"),
    ]
    assert combinations(["openvino"], ["int8"], settings={"min_sqnr_db": 20.0})[0].precision.min_sqnr_db == 20


@pytest.mark.parametrize(
    ("runtimes", "precisions", "message"),
    [
        (["onnxruntim"], ["fp32"], "Did you mean 'onnxruntime'"),
        (["torch"], ["fp32"], "the torch runtime has no engines to compare"),
        (["openvino"], ["int9"], "unknown precision 'int9'"),
        (["openvino", "openvino"], ["fp32"], "openvino-fp32 was given twice"),
        ([], ["fp32"], "nothing was given"),
    ],
)
def test_a_name_that_is_not_there_is_refused(runtimes, precisions, message):
    with pytest.raises(SpecError, match=message):
        combinations(runtimes, precisions)


def test_the_frontier_is_what_nothing_beats_in_both():
    entries = (entry("slow", 4, 50), entry("fast", 1, 20), entry("worse", 2, 10), entry("failed", 0.5, 90, problem="x"))
    assert SweepReport(backbone="a", entries=entries).frontier == ("fast", "slow")
    marked = (entry("slow", 4, 50, top1=0.5), entry("fast", 1, 20, top1=0.6))
    assert SweepReport(backbone="a", entries=marked).frontier == ("fast",)


@pytest.mark.parametrize(
    ("budget", "allowed"),
    [
        ({}, True),
        ({"max_ms": 2.0}, True),
        ({"max_ms": 1.9}, False),
        ({"max_mb": 0.9}, False),
        ({"min_top1": 0.5}, True),
        ({"min_top1": 0.51}, False),
    ],
)
def test_a_budget_is_every_limit(budget, allowed):
    assert SweepBudget(**budget).allows(entry("a", 2.0, 30, top1=0.5)) is allowed
    assert not SweepBudget(**budget).allows(entry("a", 2.0, 30, top1=0.5, problem="outside its budget"))


@pytest.fixture(scope="module")
def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Tiny().eval()


@pytest.fixture(scope="module")
def validation(tmp_path_factory):
    """Ten classes with one small image each."""
    folder, noise = tmp_path_factory.mktemp("labelled"), np.random.default_rng(0)
    for index in range(10):
        (folder / f"class{index}").mkdir()
        Image.fromarray(noise.integers(0, 255, (32, 32, 3), np.uint8)).save(folder / f"class{index}" / "a.png")
    return folder


def test_every_combination_is_measured_and_the_best_is_kept(network, validation, tmp_path):
    tried = combinations(["onnxruntime", "openvino"], ["fp32", "bf16"])
    images = np.random.default_rng(0).normal(size=(16, 3, 32, 32)).astype(np.float32)
    report = sweep(
        network,
        tmp_path / "best",
        tried,
        calibration=images,
        validation=str(validation),
        backbone={"image_size": 32, "labels": [f"class{index}" for index in range(10)]},
    )
    by_name = {each.name: each for each in report.entries}
    assert by_name["onnxruntime-bf16"].problem.startswith("it has fp32")
    for name in ("onnxruntime-fp32", "openvino-fp32"):
        found = by_name[name]
        assert found.problem == ""
        assert found.worst_db > 80
        assert min(found.ms, found.load_ms, found.megabytes) > 0
        assert 0 <= found.top1 <= 1
    fitting = [each for each in report.entries if not each.problem]
    assert report.best == min(fitting, key=lambda each: each.ms).name
    manifest = open_bundle(tmp_path / "best")
    assert report.best == f"{manifest.runtime}-{manifest.precision}"


def test_what_does_not_fit_is_told_and_nothing_is_kept(network, tmp_path):
    tried = combinations(["onnxruntime"], ["fp32"], settings={"min_sqnr_db": 250.0})
    with pytest.raises(ExportError, match=r"no combination gave an engine.*\n  onnxruntime-fp32: outside its budget"):
        sweep(network, tmp_path / "best", tried, backbone={"image_size": 32})
    assert not (tmp_path / "best").exists()


@pytest.mark.parametrize("limit", [{"max_ms": 0.0}, {"max_mb": -1.0}, {"max_ms": float("nan")}])
def test_a_limit_of_nothing_is_refused(limit):
    with pytest.raises(SpecError, match="must be above 0"):
        SweepBudget(**limit)


def test_images_that_are_not_there_are_refused_before_any_work(network, tmp_path):
    with pytest.raises(SpecError, match="no such file or folder"):
        sweep(network, tmp_path / "best", combinations(["onnxruntime"], ["fp32"]), validation=str(tmp_path / "absent"))
