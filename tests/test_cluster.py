"""Work in Ray's processes gives the bits of one process; Ray is imported by nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import deploykit
from deploykit.bundle_files import PLAN_FILE, SHIFT_FILE
from deploykit.cluster import FAILURE, RESULT, _error_of, _Process, run_pieces
from deploykit.dataset import open_dataset
from deploykit.errors import DeployKitError, ImageError, MissingDependency, SpecError
from deploykit.extraction import ShardWorker, extract, shard_path
from tests.accuracy.small_classifier import export, pixels, small_classifier


def test_ray_is_not_imported_where_it_is_not_asked_for():
    code = (
        "import sys, os, deploykit.extraction, deploykit.calibration.cluster_statistics; "
        "print('ray' in sys.modules, os.environ['RAY_USAGE_STATS_ENABLED'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "0"]


def test_workers_without_ray_are_refused(tmp_path):
    with pytest.raises(SpecError, match="ray is off"):
        extract(pixels(), tmp_path, tmp_path / "out.parquet", workers=2)
    module, shape = small_classifier()
    with pytest.raises(SpecError, match="ray is off"):
        deploykit.export_backbone(module, tmp_path / "x", runtime="onnxruntime", workers=2, **shape)


@pytest.fixture(scope="module")
def ray():
    """Two processes, shared by the tests: starting them takes longer than the work."""
    pytest.importorskip("ray", reason="ray is not installed")
    from deploykit.cluster import cluster

    with cluster() as ray:
        yield ray


@pytest.mark.slow
def test_two_workers_give_the_rows_of_one_process(ray, tmp_path, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    bundle = export(tmp_path / "bundle", classes=0)
    for index, image in enumerate(pixels()):
        path = tmp_path / "images" / f"class{index % 3}" / f"{index:03}.png"
        path.parent.mkdir(exist_ok=True, parents=True)
        Image.fromarray(image).save(path)
    monkeypatch.chdir(tmp_path)
    heard = []
    extract("images", bundle, "one.parquet", shard=7)
    done = extract("images", bundle, "two.parquet", shard=7, ray=True, workers=2, progress=heard.append)
    assert (done.rows, done.resumed, heard[-1].done) == (60, 0, 60)
    assert (tmp_path / "one.parquet").read_bytes() == (tmp_path / "two.parquet").read_bytes()
    assert parquet.read_table("two.parquet").num_rows == 60

    (tmp_path / "images" / "class0" / "bad.png").write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"bad\.png"):
        extract("images", bundle, "three.parquet", ray=True, workers=2)
    done = extract("images", bundle, "three.parquet", ray=True, workers=1, skip_corrupt=True, overwrite=True)
    assert (done.rows, done.skipped) == (61, 1)


@pytest.mark.slow
def test_two_workers_give_the_plan_of_one_process_bit_by_bit(ray, tmp_path):
    module, shape = small_classifier()
    images = np.random.default_rng(0).normal(size=(21, 3, 32, 32)).astype(np.float32)
    common = {"runtime": "onnxruntime", "precision": "int8", "calibration": images, "batch_size": "dynamic", **shape}
    deploykit.export_backbone(module, tmp_path / "one", **common)
    os.environ["DEPLOYKIT_CACHE"], before = str(tmp_path / "other-cache"), os.environ["DEPLOYKIT_CACHE"]
    try:
        deploykit.export_backbone(module, tmp_path / "two", ray=True, workers=2, **common)
    finally:
        os.environ["DEPLOYKIT_CACHE"] = before
    for file in (PLAN_FILE, SHIFT_FILE, "model.onnx"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


class Halves:
    """A piece of work: half of a number, which odd ones have not."""

    def __init__(self, most: int) -> None:
        if most < 1:
            raise SpecError(f"most is {most}")
        self.most = most

    def __call__(self, number: int) -> bytes:
        if number > self.most:
            raise MissingDependency("no such number", package="numbers", command="pip install numbers")
        if number % 2:
            raise ImageError(f"{number} is odd")
        return str(number // 2).encode()


def test_a_process_answers_with_results_and_with_errors_that_come_back_as_they_were():
    answers = _Process(Halves, {"most": 10})({"piece": [4, 5, 12]})
    assert answers[RESULT] == [b"2", b"", b""]
    none, odd, most = answers[FAILURE]
    assert none == ""
    assert isinstance(_error_of(odd), ImageError)
    assert str(_error_of(odd)) == "5 is odd"
    assert (type(_error_of(most)), str(_error_of(most))) == (DeployKitError, "no such number"), "it takes more words"
    assert type(_error_of("OSError\nno class of deploykit's")) is DeployKitError


def test_a_process_that_cannot_begin_says_so_for_each_piece():
    answers = _Process(Halves, {"most": 0})({"piece": [2, 4]})
    assert answers[RESULT] == [b"", b""]
    assert {(type(_error_of(text)), str(_error_of(text))) for text in answers[FAILURE]} == {(SpecError, "most is 0")}


@pytest.mark.parametrize("workers", [0, True, 1.5])
def test_a_number_of_workers_that_cannot_be_is_refused(workers):
    with pytest.raises(SpecError, match=rf"workers is {workers!r}; expected how many processes, 1 or more, or None"):
        list(run_pieces(sys, Halves, {}, [1], workers))


def test_no_pieces_are_no_work():
    assert list(run_pieces(sys, Halves, {}, [], None)) == []


def test_a_worker_of_an_extraction_writes_the_shard_of_its_number(tmp_path):
    pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    bundle = export(tmp_path / "bundle", classes=0)
    settings = {"pool": True, "shard": 7, "skip_corrupt": False}
    worker = ShardWorker(Path.cwd(), tmp_path, open_dataset(pixels()), {"folder": bundle}, settings)
    assert [worker(0), worker(8)] == [b"7", b"4"]
    parquet = pytest.importorskip("pyarrow.parquet")
    assert parquet.read_table(shard_path(tmp_path, 8)).column("image").to_pylist() == ["56", "57", "58", "59"]
    worker._job.model.close()
