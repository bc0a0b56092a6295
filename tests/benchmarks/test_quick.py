"""Each benchmark once, in its quick form, on the smallest network."""

from __future__ import annotations

import json

import pytest

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
        (runtime, precision) for runtime in ("onnxruntime", "openvino") for precision in ("fp32", "int8")
    }
    for row in found["rows"]:
        assert 0 < row["share"] < 1 and abs(row["total"]["macs"] / row["macs"] - 1) < 0.05
        assert (row["total"]["float_ms"] > 0) == (row["precision"] == "int8")
    assert found["machine"]["cores"] and "depthwise" in capsys.readouterr().out
    assert picture.read_text().startswith("<?xml") and (tmp_path / "limit-dark.svg").exists()
