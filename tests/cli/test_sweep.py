"""``deploykit sweep``: the table, JSON, the plot, and what it refuses."""

from __future__ import annotations

import pytest

from tests.small_resnet import SMALL

NETWORK = ("sweep", SMALL, "--image-size", "64")


def test_one_table_and_one_bundle(call, tmp_path):
    done = call(*NETWORK, "--runtimes", "onnxruntime", "--precisions", "fp32", "-o", tmp_path / "best")
    assert done.code == 0, done.err
    assert "│ onnxruntime-fp32 " in done.out
    assert "kept" in done.out
    assert done.out.splitlines()[-1] == f"Next: deploykit verify {tmp_path / 'best'}"
    assert (tmp_path / "best" / "manifest.json").is_file()


def test_no_engine_within_the_budget_is_a_failure_that_still_shows_and_draws_what_was_measured(call, tmp_path):
    words = ("--runtimes", "onnxruntime", "--precisions", "fp32", "--max-ms", "0.000001")
    done = call(*NETWORK, *words, "--plot", tmp_path / "sweep.svg", "-o", tmp_path / "best")
    assert done.code == 1
    assert "│ onnxruntime-fp32 " in done.out
    assert done.out.splitlines()[-1].startswith("No engine is within the budget, so none was kept.")
    assert "onnxruntime" in (tmp_path / "sweep.svg").read_text()
    assert not (tmp_path / "best").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--runtimes", "openvin"), "Did you mean 'openvino'"),
        (("--precisions", "fp32,,"), "--precisions is 'fp32,,'; expected names with commas between them"),
        (("--min-top1", "0.5"), "give a share from 0 to 1, and labelled images with --validation"),
        (("--min-top1", "3", "--validation", "x"), "--min-top1 is 3; give a share"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(call, words, message, tmp_path):
    done = call(*NETWORK, *words, "-o", tmp_path / "best")
    assert done.code == 2
    assert message in done.err
