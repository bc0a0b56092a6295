"""Stages by time and peak memory, and processes of which only the last line counts."""

from __future__ import annotations

import sys
import time

import numpy as np
import pytest


@pytest.fixture(scope="module")
def memory(script):
    return script("_memory")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a peak begin anew")
def test_a_stage_has_its_own_time_and_peak(memory):
    stages = memory.Stages()
    with stages.stage("large"):
        array = np.ones(40_000_000, np.float32)
        del array
    with stages.stage("slow"):
        time.sleep(0.05)
    with stages.stage("large"):
        pass
    large, slow = stages.found.values()
    assert (large.name, slow.name) == ("large", "slow")
    assert large.peak_mb - slow.peak_mb > 100
    assert 0.05 <= slow.seconds < 1


def test_what_a_process_says_last_is_its_result_and_its_errors_are_shown(memory, tmp_path):
    script = tmp_path / "child.py"
    script.write_text("import os, sys\nprint('noise')\nprint([len(sys.argv), int(os.environ['GIVEN'])])\n")
    assert memory.in_a_process(str(script), ["a"], GIVEN="7") == [2, 7]
    script.write_text("raise ValueError('no such thing')")
    with pytest.raises(SystemExit, match="no such thing"):
        memory.in_a_process(str(script), [])


def test_planning_stands_beside_the_stock_quantizer(script, memory, capsys):
    pipeline = script("pipeline")

    def stage(name, seconds, peak):
        return memory.Stage(name=name, seconds=seconds, peak_mb=peak)

    found = {
        "deploykit": [stage("fuse", 9.0, 900.0), stage("plan", 3.0, 600.0)],
        "by hand": [stage("quantize_static", 2.0, 500.0)],
    }
    assert pipeline.ratios(found) == (1.5, 1.2)
    pipeline.report("resnet50", 300, found)
    assert "time 1.50 (bar 1.3), memory 1.20 (bar 1.2)" in capsys.readouterr().out
