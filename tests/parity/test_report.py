from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest
from rich.console import Console

from deploykit.errors import BundleError, ParityError
from deploykit.parity.report import MAX_MAX_ABS, MAX_RELATIVE_L2, MAX_SQNR_DB, LevelParity, ParityReport


def level(name: str, sqnr_db: float, **changes) -> LevelParity:
    fields = {"cosine": 0.99, "relative_l2": 0.01, "max_abs": 0.5, "passed": sqnr_db >= 12}
    return LevelParity(name=name, sqnr_db=sqnr_db, **(fields | changes))


def report(*levels: LevelParity, **changes) -> ParityReport:
    fields = {"runtime": "openvino", "runtime_version": "2026.4.1", "precision": "int8", "images": 24}
    return ParityReport(levels=levels, min_sqnr_db=12.0, **(fields | changes))


GOOD = level("stage1", 30.25)
BAD = level("stage2", 3.14)
BROKEN = level("stage3", -MAX_SQNR_DB, relative_l2=MAX_RELATIVE_L2, max_abs=MAX_MAX_ABS, cosine=0.0)
EXACT = level("stage4", MAX_SQNR_DB)
SWAPPED = level("logits", 20.0, top1_agreement=0.5, passed=False)


def rendered(table) -> str:
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    with console.file:
        console.print(table)
    return console.export_text()


def test_a_report_passes_when_every_level_does():
    report(GOOD, EXACT).raise_for_failures()
    assert report(GOOD, EXACT).passed
    assert report(GOOD, EXACT).failures() == ()
    assert not report(GOOD, BAD).passed
    assert report(GOOD, BAD, EXACT, BROKEN).failures() == (BAD, BROKEN)


def test_nothing_compared_is_no_pass():
    for empty in (report(), report(GOOD, images=0)):
        assert not empty.passed
        with pytest.raises(ParityError, match="expected at least one"):
            empty.raise_for_failures()


def test_the_error_names_each_failing_level_with_its_figure_and_budget():
    with pytest.raises(ParityError) as caught:
        report(GOOD, BAD, BROKEN, SWAPPED, min_top1_agreement=0.9).raise_for_failures()
    message = str(caught.value)
    assert "3 of 4 levels" in message
    assert "stage2: 3.1 dB; budget at least 12 dB" in message
    assert "stage3: NaN, infinity" in message
    assert "logits: top-1 agreement 50.0%; budget at least 90.0%" in message
    assert "stage1" not in message
    assert "Calibrate with more images" in message


def test_a_saved_report_comes_back_equal_and_is_plain_json(tmp_path):
    path = tmp_path / "parity.json"
    whole = report(GOOD, BAD, BROKEN, EXACT, SWAPPED, min_top1_agreement=0.9)
    whole.save(path)
    assert ParityReport.load(path) == whole
    raw = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert raw["levels"][0]["sqnr_db"] == 30.25


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"levels": 3}', "\x00"])
def test_a_damaged_report_is_a_bundle_error_that_names_the_file(tmp_path, text):
    path = tmp_path / "parity.json"
    path.write_text(text)
    with pytest.raises(BundleError, match=r"parity\.json is not a parity report"):
        ParityReport.load(path)


def test_a_wrong_type_in_a_report_says_where(tmp_path):
    report(GOOD).save(tmp_path / "parity.json")
    raw = json.loads((tmp_path / "parity.json").read_text())
    raw["levels"][0]["sqnr_db"] = "high"
    (tmp_path / "parity.json").write_text(json.dumps(raw))
    with pytest.raises(BundleError, match=r"levels.*sqnr_db"):
        ParityReport.load(tmp_path / "parity.json")


def test_a_missing_report_and_a_folder_that_cannot_be_written_are_bundle_errors(tmp_path):
    with pytest.raises(BundleError, match="cannot be read"):
        ParityReport.load(tmp_path / "absent.json")
    with pytest.raises(BundleError, match="cannot be written"):
        report(GOOD).save(tmp_path / "absent" / "parity.json")


def test_the_table_has_every_level_and_only_the_columns_that_say_something():
    text = rendered(report(GOOD, BAD, BROKEN, EXACT).render())
    for part in ("stage1", "30.2", "stage2", "FAIL", "broken", "exact", "24 images; budget 12 dB", "openvino 2026.4.1"):
        assert part in text
    assert "top-1" not in text
    assert "measured on" not in text
    elsewhere = dataclasses.replace(SWAPPED, measured_on="onnxruntime")
    text = rendered(report(GOOD, elsewhere, min_top1_agreement=0.9).render())
    for part in ("top-1", "50.0%", "measured on", "onnxruntime", "top-1 agreement 90.0%"):
        assert part in text


def test_the_device_side_imports_no_torch_onnx_runtime_or_rich():
    code = """
import sys
import deploykit.bundle, deploykit.cache
import deploykit.parity.compare, deploykit.parity.reference
print(sorted({name.partition(".")[0] for name in sys.modules} & {"torch", "onnx", "onnxruntime", "openvino", "rich"}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_parity_does_not_import_the_bundle():
    code = "import sys, deploykit.parity.compare, deploykit.parity.reference; print('deploykit.bundle' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_each_further_comparison_is_a_line_with_its_worst_output():
    small = report(GOOD, BAD, reference="torch fp32 at 64x64")
    large = report(GOOD, EXACT, reference="torch fp32 at 256x256")
    whole = report(GOOD, further=(small, large))
    assert whole.further_lines() == [
        "against torch fp32 at 64x64: stage2 3.1 dB, FAIL",
        "against torch fp32 at 256x256: stage1 30.2 dB, pass",
    ]


def test_an_engine_that_gives_other_than_at_its_export_has_a_remedy_of_its_own():
    """Which is not that of a quantization with too much noise."""
    moved = level("stage1", 30.0, passed=False, faults=("class 3: up to 9 times as far",), agreement_db=20.0)
    with pytest.raises(ParityError, match=r"class 3.*(?s:.)*does not give what it gave when it was exported\. Copy"):
        report(moved).raise_for_failures()
