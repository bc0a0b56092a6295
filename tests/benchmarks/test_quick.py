"""Each benchmark once, in its quick form, on the smallest network."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

SMALL = "mobilenetv3_small_075"


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """The folder of engines that the scripts share."""
    return tmp_path_factory.mktemp("engines")


@pytest.mark.slow
def test_limit_says_where_the_time_goes(script, work, tmp_path, capsys):
    arguments = ["--quick", "--networks", SMALL, "--rounds", "5", "--work", str(work)]
    results, picture = tmp_path / "limit.json", tmp_path / "limit.svg"
    script("limit").main([*arguments, "--json", str(results), "--plot", str(picture)])
    found = json.loads(results.read_text())
    assert {(row["runtime"], row["precision"]) for row in found["rows"]} == {
        (runtime, precision) for runtime in ("onnxruntime", "openvino", "litert") for precision in ("fp32", "int8")
    }
    assert all(0 < row["share"] < 1 for row in found["rows"])
    for row in (row for row in found["rows"] if row["runtime"] != "litert"):
        assert abs(row["total"]["macs"] / row["macs"] - 1) < 0.05
        assert (row["total"]["float_ms"] > 0) == (row["precision"] == "int8")
    assert found["machine"]["cores"] and "depthwise" in capsys.readouterr().out
    assert picture.read_text().startswith("<?xml") and (tmp_path / "limit-dark.svg").exists()


@pytest.mark.slow
def test_pipeline_times_both_ways_stage_by_stage(script, tmp_path, capsys):
    results = tmp_path / "pipeline.json"
    script("pipeline").main(["--network", SMALL, "--images", "4", "--json", str(results)])
    found = json.loads(results.read_text())
    assert {"load", "trace", "fuse", "plan", "lower", "parity"} <= {stage["name"] for stage in found["deploykit"]}
    assert [stage["name"] for stage in found["by_hand"]] == ["load", "torch.onnx.export", "quantize_static"]
    for stage in (*found["deploykit"], *found["by_hand"]):
        assert stage["seconds"] > 0 and 50 < stage["peak_mb"] < 4000
    assert "plan over quantize_static: time" in capsys.readouterr().out


@pytest.mark.slow
def test_startup_starts_both_ways_in_processes(script, work, tmp_path, capsys):
    results = tmp_path / "startup.json"
    script("startup").main(["--network", SMALL, "--starts", "2", "--work", str(work), "--json", str(results)])
    rows = json.loads(results.read_text())["rows"]
    assert [(row["runtime"], row["way"]) for row in rows] == [
        (runtime, way) for runtime in ("onnxruntime", "openvino") for way in ("raw", "ours")
    ]
    assert all(row["open_ms"] > 0 and row["first_ms"] > 0 and row["memory_mb"] > 20 for row in rows)
    assert [row["import_ms"] > 0 for row in rows] == [False, True, False, True]
    assert "bar 1.2" in capsys.readouterr().out


@pytest.mark.slow
def test_zoo_compares_int8_with_fp32_and_names_what_does_not_convert(script, tmp_path, capsys):
    results = tmp_path / "zoo.json"
    arguments = ["--quick", "--networks", "timm/test_byobnet", "--images", "2", "--rounds", "3"]
    script("zoo").main([*arguments, "--json", str(results)])
    rows = json.loads(results.read_text())["rows"]
    assert [row["runtime"] for row in rows] == ["onnxruntime", "openvino"]
    assert all(row["fp32_db"] > 80 > row["int8_db"] and row["ratio"] > 0 for row in rows)
    assert "random weights" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no_such_network"):
        script("zoo").main(["--networks", "no_such_network"])


@pytest.mark.slow
def test_end_to_end_gives_the_usual_ways_features(script, tmp_path, capsys):
    results = tmp_path / "end_to_end.json"
    script("end_to_end").main(["--quick", "--network", SMALL, "--images", "4", "--passes", "2", "--json", str(results)])
    rows = json.loads(results.read_text())["rows"]
    assert {row["way"] for row in rows} == {"usual way", "load_images", "pixels in", "stream"}
    assert all(row["db"] > 40 and row["images_per_s"] > 0 for row in rows)
    assert "images/s" in capsys.readouterr().out


@pytest.mark.slow
def test_the_facade_stands_beside_both_raw_calls(script, work, tmp_path, capsys):
    results = tmp_path / "facade.json"
    script("facade_overhead").main(["--network", SMALL, "--rounds", "20", "--work", str(work), "--json", str(results)])
    rows = json.loads(results.read_text())["rows"]
    assert len(rows) == 6 and all(0 < row["facade_us"] < 1000 * row["ours_ms"] for row in rows)
    assert "the bar, 1.03" in capsys.readouterr().out


@pytest.mark.slow
def test_options_are_compared_with_the_defaults(script, work, tmp_path):
    results = tmp_path / "options.json"
    arguments = ["--networks", SMALL, "--rounds", "3", "--work", str(work), "--json", str(results)]
    script("adapter_options").main(arguments)
    rows = json.loads(results.read_text())["rows"]
    assert {(row["runtime"], row["how"]) for row in rows} == {
        *((runtime, how) for runtime in ("onnxruntime", "openvino") for how in ("alone", "in turn")),
        ("openvino", "two processes"),
        ("litert", "alone"),
    }
    assert all(row["with_ms"] > 0 and row["without_ms"] > 0 and row["ratio"] > 0 for row in rows)
    with_db = {(row["option"], row["precision"]): row["with_db"] for row in rows if row["with_db"] is not None}
    assert with_db["pinned precision", "fp32"] > 80
    assert {precision for _, precision in with_db} == {"fp32", "int8"}


@pytest.mark.slow
def test_phones_stand_beside_the_same_plan(script, tmp_path, capsys):
    results = tmp_path / "phones.json"
    arguments = ["--networks", SMALL, "--runtimes", "litert", "--work", str(tmp_path / "engines")]
    script("phone_runtimes").main([*arguments, "--json", str(results)])
    rows = json.loads(results.read_text())["rows"]
    assert [row["precision"] for row in rows] == ["fp32", "int8"] and not any(row["refused"] for row in rows)
    assert min(rows[0]["levels"]) >= 90 > min(rows[1]["levels"])
    assert all(len(row["levels"]) == len(row["unoptimized"]) == 6 for row in rows)
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_make_bench_runs_scripts_that_have_a_quick_form():
    makefile = (BENCHMARKS.parent / "Makefile").read_text()
    names = re.search(r"^QUICK := (.*)$", makefile, re.MULTILINE)[1].split()
    assert {"peers", "limit"} <= set(names)
    for name in names:
        assert "_results import" in (BENCHMARKS / f"{name}.py").read_text(), name
