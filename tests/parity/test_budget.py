"""Budgets of the caller's own."""

from __future__ import annotations

import dataclasses

import pytest

from deploykit.errors import SpecError
from deploykit.parity.budget import Budget
from deploykit.parity.report import LevelParity, ParityReport

LEVEL = LevelParity(name="stage1", sqnr_db=30.0, cosine=1.0, relative_l2=0.03, max_abs=0.1, passed=True)
LOGITS = dataclasses.replace(LEVEL, name="logits", sqnr_db=25.0, top1_agreement=0.9)
REPORT = ParityReport(
    runtime="onnxruntime", runtime_version="1", precision="int8", images=10, min_sqnr_db=12.0, levels=(LEVEL, LOGITS)
)


def verdicts(budget: Budget, report: ParityReport = REPORT, exported: ParityReport | None = None) -> list[bool]:
    return [level.passed for level in budget.hold(report, exported).levels]


def test_no_budget_leaves_the_report_as_it_is():
    assert Budget().hold(REPORT, None) is REPORT


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (Budget(min_sqnr_db=28), [True, False]),
        (Budget(min_sqnr_db=10), [True, True]),
        (Budget(min_top1_agreement=0.95), [True, False]),
        (Budget(min_top1_agreement=0.9), [True, True]),
    ],
)
def test_a_budget_judges_every_level_anew(budget, expected):
    assert verdicts(budget) == expected


def test_a_lower_budget_lets_a_failed_level_pass_but_no_fault():
    failed = dataclasses.replace(REPORT, levels=(dataclasses.replace(LEVEL, sqnr_db=9.0, passed=False),))
    assert verdicts(Budget(min_sqnr_db=5), failed) == [True]
    faulty = dataclasses.replace(LEVEL, passed=False, faults=("every value is 0",))
    assert verdicts(Budget(min_sqnr_db=5), dataclasses.replace(REPORT, levels=(faulty,))) == [False]
    broken = dataclasses.replace(LEVEL, sqnr_db=-300.0, passed=False)
    assert verdicts(Budget(min_sqnr_db=-300), dataclasses.replace(REPORT, levels=(broken,))) == [False]


def test_a_drop_is_counted_from_what_the_export_gave():
    exported = dataclasses.replace(REPORT, levels=(LEVEL, dataclasses.replace(LOGITS, sqnr_db=26.5)))
    assert verdicts(Budget(max_drop_db=1), exported=exported) == [True, False]
    held = Budget(max_drop_db=1).hold(REPORT, exported)
    assert "logits: 1.5 dB farther from torch than when exported; allowed 1" in _message(held)
    assert verdicts(Budget(max_drop_db=2), exported=exported) == [True, True]
    with pytest.raises(SpecError, match="does not carry it"):
        Budget(max_drop_db=1).hold(REPORT, None)


def _message(report: ParityReport) -> str:
    from deploykit.errors import ParityError

    with pytest.raises(ParityError) as caught:
        report.raise_for_failures()
    return str(caught.value)


def test_roundings_of_float32_are_no_drop():
    before, after = (dataclasses.replace(REPORT, levels=(dataclasses.replace(LEVEL, sqnr_db=db),)) for db in (140, 105))
    assert verdicts(Budget(max_drop_db=1), after, before) == [True]


@pytest.mark.parametrize(
    "wrong", [{"min_sqnr_db": float("nan")}, {"min_top1_agreement": -0.1}, {"max_drop_db": float("inf")}]
)
def test_a_number_out_of_range_is_refused(wrong):
    with pytest.raises(SpecError):
        Budget(**wrong)


def test_a_class_budget_needs_classes():
    with pytest.raises(SpecError, match="the outputs are stage1"):
        Budget(min_top1_agreement=0.9).hold(dataclasses.replace(REPORT, levels=(LEVEL,)), None)


def test_what_passes_narrowly_is_noted():
    near = dataclasses.replace(REPORT, min_sqnr_db=24.5, min_top1_agreement=0.85)
    notes = near.notes()
    assert notes[0] == "logits: 25.0 dB, near its budget of 24.5 dB"
    assert "90.0% (59.6% to 98.2%) on 10 images, of 85.0%" in notes[1]
    assert not REPORT.notes()
