from __future__ import annotations

import pytest
import torch

from deploykit import create_backbone, export_backbone, load_bundle
from deploykit.bundle import open_bundle
from deploykit.calibration.plan import QuantizationPlan
from deploykit.calibration.search import SearchReport
from deploykit.export.pipeline import SEARCH_FILE
from deploykit.parity.report import ParityReport
from deploykit.progress import CandidateMeasured
from deploykit.spec import Int8
from tests.backbones.realistic import randomize
from tests.small_resnet import SMALL


@pytest.fixture(scope="module")
def backbone():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return randomize(create_backbone(SMALL, image_size=64, num_classes=10)).eval()


@pytest.fixture(scope="module")
def worst_db(backbone, photographs, tmp_path_factory) -> float:
    """The worst level of the engine with all layers in integers."""
    folder = tmp_path_factory.mktemp("plain") / "bundle"
    export_backbone(backbone, folder, runtime="onnxruntime", precision="int8", calibration=photographs)
    return min(level.sqnr_db for level in ParityReport.load(folder / "parity.json").levels)


def searched(backbone, photographs, folder, runtime, **settings):
    heard = []
    metric = settings.pop("metric", None)
    result = export_backbone(
        *(backbone, folder),
        runtime=runtime,
        precision=Int8(mixed_precision=True, **settings),
        calibration=photographs,
        metric=metric,
        progress=lambda event: isinstance(event, CandidateMeasured) and heard.append(event.summary),
    )
    report = SearchReport.load(folder / SEARCH_FILE)
    assert result.search == report
    assert heard
    return result.manifest, report, heard


@pytest.mark.parametrize(
    ("runtime", "cost"),
    [
        pytest.param("onnxruntime", "profile", marks=pytest.mark.slow),
        pytest.param("openvino", "MACs", marks=pytest.mark.slow),
    ],
)
def test_a_budget_that_int8_misses_is_met_with_some_layers_in_float(
    backbone, photographs, tmp_path, monkeypatch, worst_db, runtime, cost
):
    monkeypatch.setenv("DEPLOYKIT_CACHE", str(tmp_path / "cache"))
    budget = worst_db + 3
    manifest, report, heard = searched(backbone, photographs, tmp_path / "bundle", runtime, min_sqnr_db=budget)
    assert report.cost_from == cost
    assert len(heard) == len(report.candidates)
    assert not report.candidates[0].within_budget
    chosen = report.candidates[report.chosen]
    assert 0 < len(chosen.float_nodes) < 21
    assert all(entry.measured.speedup > 0 for entry in report.candidates)
    plan = QuantizationPlan.load(tmp_path / "bundle")
    assert set(chosen.float_nodes) == plan.placement.float_nodes.keys()
    assert all("kept in float by the search" in reason for reason in plan.placement.float_nodes.values())
    levels = ParityReport.load(tmp_path / "bundle" / "parity.json").levels
    assert min(level.sqnr_db for level in levels) == pytest.approx(chosen.measured.sqnr_db, abs=0.01)
    assert SEARCH_FILE in open_bundle(tmp_path / "bundle").files
    assert manifest.status == "parity_checked"
    assert len(list((tmp_path / "cache" / "searches").iterdir())) == len(heard)


@pytest.mark.slow
def test_a_metric_of_the_users_own_is_a_budget_too(backbone, photographs, tmp_path, worst_db):
    opened = []

    def metric(model) -> float:
        opened.append(model)
        return -1.0 if model.precision.name == "int8" else 0.0

    _, report, _ = searched(
        backbone, photographs, tmp_path / "bundle", "onnxruntime", metric=metric, max_metric_drop=2.0
    )
    assert report.budget.min_metric == -2.0
    assert [entry.measured.metric for entry in report.candidates] == [-1.0]
    assert [model.precision.name for model in opened] == ["fp32", "int8"]
    with load_bundle(tmp_path / "bundle") as model:
        assert model.precision.max_metric_drop == 2.0


@pytest.mark.slow
def test_nncfs_accuracy_control_goes_before_the_search(backbone, photographs, tmp_path):
    pytest.importorskip("nncf", reason="nncf is not installed")
    export_backbone(
        backbone, tmp_path / "plain", runtime="onnxruntime", precision=Int8(recipe="nncf"), calibration=photographs
    )
    reached = min(level.sqnr_db for level in ParityReport.load(tmp_path / "plain" / "parity.json").levels)
    manifest, report, _ = searched(
        backbone, photographs, tmp_path / "bundle", "onnxruntime", recipe="nncf", min_sqnr_db=reached + 2
    )
    assert report.candidates[report.chosen].within_budget
    assert manifest.status == "parity_checked"
    plan = QuantizationPlan.load(tmp_path / "bundle")
    assert plan.calibrator == "nncf"
    assert plan.placement.weights
    assert "NNCF leaves it in float" in plan.placement.float_nodes.values()
