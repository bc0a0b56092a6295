"""``deploykit verify`` of several bundles, and with limits of one's own."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

BUNDLES = Path(__file__).parent.parent / "data" / "bundles-0.1.0"
GOOD = BUNDLES / "onnxruntime-int8"


@pytest.fixture
def damaged(tmp_path) -> Path:
    folder = shutil.copytree(GOOD, tmp_path / "damaged")
    (folder / "model.onnx").write_bytes(b"something else")
    return folder


def test_every_bundle_is_verified_whatever_the_first_one_says(call, damaged):
    done = call("verify", damaged, GOOD)
    assert done.code == 3
    assert f"{GOOD} is whole and within its budget" in done.out
    assert done.out.splitlines()[-1] == f"1 of 2 bundles passed; not {damaged}."
    assert "model.onnx" in done.err


def test_several_bundles_are_one_json(call, damaged):
    told = call("verify", GOOD, damaged, "--json")
    assert told.code == 3
    found = told.json()
    assert (found["passed"], [each["passed"] for each in found["bundles"]]) == (False, [True, False])
    assert found["bundles"][1]["error"] == "BundleError"


@pytest.mark.parametrize(
    ("option", "value", "code"),
    [("--min-sqnr-db", 35, 0), ("--min-sqnr-db", 60, 1), ("--max-drop-db", 1, 0), ("--min-top1-agreement", 0.9, 2)],
)
def test_limits_of_ones_own(call, option, value, code):
    done = call("verify", GOOD, option, value)
    assert done.code == code, done.err
    if code == 1:
        assert "OUTSIDE its budget: stage1" in done.out


def test_a_limit_that_one_bundle_has_nothing_for_does_not_end_the_others(call):
    told = call("verify", GOOD, GOOD, "--min-top1-agreement", 0.9, "--json")
    assert told.code == 2
    assert [each["error"] for each in told.json()["bundles"]] == ["SpecError", "SpecError"]


def test_layers_that_cannot_be_read_leave_what_was_verified(call):
    told = call("verify", BUNDLES / "openvino-int8", "--layers", "--json")
    found = told.json()
    assert (told.code, found["error"], found["exit_code"]) == (2, "SpecError", 2)
    assert all(level["passed"] for level in found["report"]["levels"])
