from __future__ import annotations

from torch import nn

from deploykit.fusion.pipeline import EXPORT_PASSES, FusionPass, run_passes
from deploykit.fusion.tanh_gelu import LOSSY_DB, tanh_gelu
from tests.fusion.graphs import Calls, images, is_left_alone, traced


def test_it_keeps_what_it_promises_and_is_not_exact():
    graph = traced(Calls(lambda m, x: m.act(x) - 0.1 * m.act(2 * x), act=nn.GELU()))
    step = FusionPass(name="tanh-gelu", rewrite=tanh_gelu, min_sqnr_db=LOSSY_DB)
    (record,) = run_passes(graph, images(), (step,))
    assert record.rewrites == 2
    assert LOSSY_DB < record.sqnr_db < 90


def test_a_tanh_gelu_is_left_alone():
    assert is_left_alone(Calls(lambda m, x: m.act(x), act=nn.GELU(approximate="tanh")), tanh_gelu)


def test_no_export_runs_it():
    assert tanh_gelu not in [step.rewrite for step in EXPORT_PASSES]
