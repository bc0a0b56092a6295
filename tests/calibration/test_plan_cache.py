from __future__ import annotations

import logging
from dataclasses import replace

import pytest

from deploykit.calibration.plan import PLAN_FILE, QuantizationPlan
from deploykit.calibration.plan_cache import PlanCache, cache_key

KEY = "a" * 64


class Maker:
    def __init__(self, plan: QuantizationPlan) -> None:
        self.plan = plan
        self.calls = 0

    def __call__(self) -> QuantizationPlan:
        self.calls += 1
        return self.plan


@pytest.fixture
def make(residual) -> Maker:
    return Maker(residual.plan)


def test_a_plan_is_made_once_and_comes_back_equal(make, tmp_path):
    first = PlanCache(tmp_path).get_or_make(KEY, make)
    again = PlanCache(tmp_path).get_or_make(KEY, make)
    assert make.calls == 1
    assert again.placement == first.placement
    assert again.ranges == first.ranges
    assert PlanCache(tmp_path).get_or_make("b" * 64, make) is make.plan
    assert make.calls == 2


def test_a_damaged_plan_is_made_again(make, tmp_path, caplog):
    PlanCache(tmp_path).get_or_make(KEY, make)
    (tmp_path / KEY / PLAN_FILE).write_bytes(b"{")
    with caplog.at_level(logging.WARNING):
        assert PlanCache(tmp_path).get_or_make(KEY, make) is make.plan
    assert "made again" in caplog.text
    assert QuantizationPlan.load(tmp_path / KEY).key == make.plan.key


def test_a_maker_that_fails_leaves_nothing(tmp_path):
    def fail():
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        PlanCache(tmp_path).get_or_make(KEY, fail)
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".lock"] == []


def test_a_folder_that_cannot_be_written_does_not_stop_an_export(make, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        assert PlanCache(tmp_path / "file").get_or_make(KEY, make) is make.plan
    assert "cannot be written" in caplog.text


def test_the_default_folder_stands_beside_the_engines(monkeypatch, tmp_path):
    monkeypatch.setenv("DEPLOYKIT_CACHE", str(tmp_path))
    assert PlanCache().root == tmp_path / "plans"


def test_the_key_changes_with_the_plans_key_and_with_the_graph(residual, tokens):
    key = cache_key(KEY, residual.graph.model)
    assert key == cache_key(KEY, replace(residual.graph).model)
    assert len({key, cache_key("b" * 64, residual.graph.model), cache_key(KEY, tokens.graph.model)}) == 3
