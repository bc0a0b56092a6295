from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from deploykit.backends.onnxruntime.passes import DIALECT
from deploykit.calibration.search import (
    Candidate,
    Measured,
    SearchBudget,
    SearchLog,
    SearchReport,
    search,
)
from deploykit.calibration.sensitivity import measure_sensitivity
from deploykit.errors import CalibrationError
from deploykit.parity.metrics import sqnr_db
from deploykit.store import Store
from tests.calibration.networks import written


class Engines:
    """Renders a plan for ONNX Runtime, runs it, and counts how many were built."""

    def __init__(self, case) -> None:
        self.case = case
        self.expected = case.run()
        self.built = 0

    def __call__(self, plan) -> Measured:
        self.built += 1
        found = self.case.run(written(DIALECT, self.case.graph, plan))
        figures = [sqnr_db(before, after) for before, after in zip(self.expected, found, strict=True)]
        return Measured(sqnr_db=min(300.0, *figures))


@pytest.fixture(scope="module")
def measured(residual):
    return measure_sensitivity(residual.graph.model, residual.plan, residual.images, DIALECT)


def find(residual, measured, min_sqnr_db, **options):
    engines = Engines(residual)
    budget = SearchBudget(min_sqnr_db=min_sqnr_db)
    return engines, search(residual.graph.model, residual.plan, measured, engines, budget, **options)


def test_a_plan_within_the_budget_stays_as_it_is(residual, measured):
    engines, found = find(residual, measured, 5)
    assert found.plan is residual.plan
    assert engines.built == 1


def test_nodes_are_kept_in_float_until_the_budget_is_met(residual, measured):
    whole = Engines(residual)(residual.plan).sqnr_db
    _, found = find(residual, measured, whole + 3)
    kept = {
        node: reason
        for node, reason in found.plan.placement.float_nodes.items()
        if "kept in float by the search" in reason
    }
    assert 0 < len(kept) < len(residual.plan.placement.weights)
    assert all(reason.endswith(" dB") for reason in kept.values())
    assert found.plan.placement.weights.keys() == residual.plan.placement.weights.keys() - kept.keys()
    assert Engines(residual)(found.plan).sqnr_db >= whole + 3
    chosen = found.report.candidates[found.report.chosen]
    assert chosen.within_budget
    assert set(chosen.float_nodes) == kept.keys()


def test_no_node_of_the_result_can_go_back_into_the_integers(residual, measured):
    target = Engines(residual)(residual.plan).sqnr_db + 3
    engines, found = find(residual, measured, target)
    nodes = found.report.candidates[found.report.chosen].float_nodes
    assert nodes
    for node in nodes:
        fewer = residual.plan.without(residual.graph.model, dict.fromkeys(set(nodes) - {node}, "because"))
        assert engines(fewer).sqnr_db < target


def test_a_higher_budget_keeps_more_work_in_float(residual, measured):
    whole = Engines(residual)(residual.plan).sqnr_db
    macs = {entry.node: entry.macs for entry in measured.nodes}
    work = []
    for more in (2, 6, 15):
        _, found = find(residual, measured, whole + more)
        work.append(sum(macs[node] for node in found.report.candidates[found.report.chosen].float_nodes))
    assert work == sorted(work)
    assert work[0] < work[-1]


def test_a_budget_out_of_reach_gives_the_most_accurate_candidate(residual, measured):
    _, found = find(residual, measured, 1000)
    chosen = found.report.candidates[found.report.chosen]
    assert not chosen.within_budget
    assert chosen.measured.sqnr_db == max(entry.measured.sqnr_db for entry in found.report.candidates)


def test_cheap_noise_goes_first(residual, measured):
    """With one node free and all others dear, the search keeps that one."""
    free = measured.nodes[1].node
    savings = {entry.node: 1e-9 if entry.node == free else 1.0 for entry in measured.nodes}
    whole = Engines(residual)(residual.plan).sqnr_db
    _, found = find(residual, measured, whole + 0.05, savings_ms=savings)
    assert [entry.float_nodes for entry in found.report.candidates][1] == (free,)
    assert found.report.cost_from == "profile"


def test_a_stopped_search_goes_on_where_it_was(residual, measured, tmp_path):
    store = Store(tmp_path)
    target = Engines(residual)(residual.plan).sqnr_db + 3
    heard = []

    class Stopped(Exception):
        pass

    def stop(candidate):
        heard.append(candidate)
        if len(heard) == 3:
            raise Stopped

    with pytest.raises(Stopped):
        find(residual, measured, target, log=SearchLog(store, {"network": 1}), on_candidate=stop)
    engines, found = find(residual, measured, target, log=SearchLog(store, {"network": 1}))
    fresh, again = find(residual, measured, target)
    assert engines.built == fresh.built - 3
    assert found.report == again.report
    other, _ = find(residual, measured, target, log=SearchLog(store, {"network": 2}))
    assert other.built == fresh.built


def test_a_measurement_is_kept_whatever_the_order_and_a_damaged_one_is_made_again(tmp_path):
    measured = Measured(sqnr_db=20.0, speedup=1.5)
    SearchLog(Store(tmp_path), {"network": 1}).add(["b", "a"], measured)
    assert SearchLog(Store(tmp_path), {"network": 1}).get({"a", "b"}) == measured
    assert SearchLog(Store(tmp_path), {"network": 1}).get({"a"}) is None
    assert SearchLog(Store(tmp_path), {"network": 2}).get({"a", "b"}) is None
    (file,) = tmp_path.rglob("value")
    file.write_text(file.read_text().replace("20.0", "99.0"))
    assert SearchLog(Store(tmp_path), {"network": 1}).get({"a", "b"}) is None


@pytest.mark.parametrize(
    ("budget", "met"),
    [
        (SearchBudget(min_sqnr_db=20), True),
        (SearchBudget(min_sqnr_db=21), False),
        (SearchBudget(min_sqnr_db=0, min_top1_agreement=0.9), True),
        (SearchBudget(min_sqnr_db=0, min_top1_agreement=0.95), False),
        (SearchBudget(min_sqnr_db=0, min_metric=0.7), False),
    ],
)
def test_every_gate_counts_and_a_figure_that_is_absent_fails_it(budget, met):
    assert budget.met_by(Measured(sqnr_db=20, top1_agreement=0.9)) is met


def entry(nodes: int, sqnr: float, speed: float | None, met: bool = True) -> Candidate:
    names = tuple(f"n{index}" for index in range(nodes))
    return Candidate(float_nodes=names, measured=Measured(sqnr_db=sqnr, speedup=speed), within_budget=met)


REPORT = SearchReport(
    budget=SearchBudget(min_sqnr_db=20, min_top1_agreement=0.9),
    cost_from="MACs",
    candidates=(entry(0, 18, 2.0, met=False), entry(1, 20, 1.5), entry(2, 19, 1.4, met=False), entry(4, 30, 1.2)),
    chosen=1,
)


def test_the_frontier_leaves_out_what_another_beats_in_both():
    assert [len(one.float_nodes) for one in REPORT.frontier] == [0, 1, 4]
    untimed = replace(REPORT, candidates=(entry(0, 18, None), entry(1, 20, None)))
    assert untimed.frontier == untimed.candidates


def test_the_fastest_within_the_budget_is_taken_by_measured_speed(residual, measured):
    speeds = itertools.cycle([2.0, 1.1, 1.9, 1.7])
    engines = Engines(residual)
    found = search(
        residual.graph.model,
        residual.plan,
        measured,
        lambda plan: replace(engines(plan), speedup=next(speeds)),
        SearchBudget(min_sqnr_db=engines(residual.plan).sqnr_db + 2),
    )
    within = [one.measured.speedup for one in found.report.candidates if one.within_budget]
    assert found.report.candidates[found.report.chosen].measured.speedup == max(within)


def test_a_report_survives_being_saved_and_is_refused_when_damaged(tmp_path):
    REPORT.save(tmp_path / "report.json")
    assert SearchReport.load(tmp_path / "report.json") == REPORT
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(CalibrationError, match="not a search report"):
        SearchReport.load(tmp_path / "report.json")


def test_the_table_marks_what_was_taken_and_the_frontier():
    table = REPORT.render()
    assert list(table.columns[0].cells) == [" *", ">*", "  ", " *"]
    assert list(table.columns[5].cells) == ["2.00", "1.50", "1.40", "1.20"]
    assert "20 dB, top-1 agreement 90.0%" in table.caption


def test_the_table_names_a_metrics_budget_and_the_plot_is_written(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    report = replace(REPORT, budget=SearchBudget(min_sqnr_db=20, min_metric=0.75))
    assert "20 dB, metric 0.75" in report.render().caption
    report.plot(tmp_path / "search.svg")
    drawn = (tmp_path / "search.svg").read_text()
    assert "times as fast as FP32" in drawn
    assert "SQNR of the worst level, dB" in drawn
