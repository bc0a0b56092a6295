"""The options of ``deploykit export`` that measure an INT8 engine: its speed and a mixed-precision search."""

from __future__ import annotations

import re

import pytest

from deploykit.bundle import open_bundle
from tests.small_resnet import SMALL

WORDS = ("export", SMALL, "--runtime", "openvino", "--image-size", "64", "--precision", "int8")


@pytest.fixture(scope="module")
def told(call, photos, tmp_path_factory):
    """A search whose budget everything in integers meets, so that it is one candidate long."""
    folder = tmp_path_factory.mktemp("int8") / "bundle"
    done = call(*WORDS, "--calibration", photos, "--mixed-precision", "--min-sqnr-db", "1", "-o", folder)
    assert done.code == 0, done.err
    return folder, done


@pytest.mark.slow
def test_the_ratio_to_fp32_is_printed_and_kept(told):
    folder, done = told
    speedup = open_bundle(folder).speedup
    assert speedup > 0
    against = re.search(r"^int8 is (\S+) times as fast as fp32, (\S+) times as fast as fp16,", done.out, re.MULTILINE)
    told_of = [float(figure) for figure in against.groups()]
    assert told_of[0] == pytest.approx(speedup, abs=0.011)
    slower = [figure for figure in told_of if figure != 1]  # which may be either side of the rounding
    assert ("It is slower than a float engine." in done.out) == (min(slower, default=2) < 1)


def test_the_search_prints_its_candidates_and_its_table(told):
    _, done = told
    assert "Mixed precision: speed against accuracy" in done.out
    assert "0 layers in float:" in done.err
    assert "search the layers to keep in float" in done.err


def test_few_calibration_images_are_warned_of(told):
    assert told[1].err.count("warning: only 4 different calibration images were given") == 1


@pytest.mark.slow
def test_json_holds_the_speed_and_the_search(call, photos, tmp_path):
    done = call(*WORDS, "--calibration", photos, "--min-sqnr-db", "1", "-o", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    assert done.json()["speed"]["fp32_ms"] > 0
    assert done.json()["search"] is None


@pytest.mark.slow
def test_no_speed_leaves_the_timing_out(call, photos, tmp_path):
    done = call(*WORDS, "--calibration", photos, "--min-sqnr-db", "1", "--no-speed", "-o", tmp_path / "out")
    assert done.code == 0, done.err
    assert "int8 is " not in done.out
    assert open_bundle(tmp_path / "out").speedup is None


def test_a_required_speedup_that_is_missed_fails_with_the_reason(call, photos, tmp_path, monkeypatch):
    monkeypatch.setattr("deploykit.export.evaluate.time_in_turns", lambda models, images: ([1.0, 2.0], 7))
    words = ("--min-sqnr-db", "1", "--require-speedup", "-o", tmp_path / "out")
    done = call(*WORDS, "--calibration", photos, *words)
    assert done.code == 6
    assert "int8 is 0.50 times as fast as fp32" in done.err
    assert "leave out --require-speedup" in done.err
    assert not (tmp_path / "out").exists()
