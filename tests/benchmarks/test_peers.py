"""How the benchmark of the peers reads its figures: who counts, who is beaten, what the picture and tables say."""

from __future__ import annotations

import json

import pytest

SMALL = "mobilenetv3_small_075"


@pytest.fixture(scope="module")
def peers(script):
    return script("peers")


def row(peers, route, ms, db, precision="int8", **named):
    known = {"network": SMALL, "runtime": "onnxruntime", "quartiles": (ms, ms) if ms else None, "top1": 1.0}
    return peers.Row(route=route, precision=precision, ms=ms, db=db, **known | named)


@pytest.fixture
def rows(peers):
    """Ours at FP32 and INT8, a peer that is right, a fast wrong one, and one that fails."""
    failed = row(peers, "NNCF on ONNX", None, None, failure="Fail: no such type")
    return [
        row(peers, peers.OURS, 4.0, 120.0, "fp32"),
        row(peers, peers.OURS, 2.0, 30.0),
        row(peers, "quantize_static", 2.5, 20.0),
        row(peers, "ModelOpt", 1.0, 11.9),
        failed,
    ]


def test_a_fast_wrong_answer_is_marked_and_is_no_peer(peers, rows, capsys):
    cell = next(cell for cell in peers.cells_of(rows) if cell.precision == "int8")
    assert (cell.peer.route, cell.ratio, cell.over_fp32) == ("quantize_static", 0.8, 2.0)
    assert (cell.closest.route, cell.closest.db) == ("quantize_static", 20.0)
    peers.report(rows)
    shown = {line.split()[2]: line for line in capsys.readouterr().out.splitlines() if "onnxruntime" in line}
    assert shown["ModelOpt"].endswith("wrong") and not shown["quantize_static"].endswith("wrong")
    assert "Fail: no such type" in shown["NNCF"]


def test_a_cell_without_a_right_peer_has_no_ratio_and_ours_may_be_wrong_too(peers, rows, capsys):
    alone = [row(peers, peers.OURS, 2.0, 5.0), rows[3]]
    (cell,) = peers.cells_of(alone)
    assert (cell.peer, cell.closest, cell.ratio, cell.over_fp32) == (None, None, None, None)
    peers.summarize(alone)
    assert "none is right; ours is wrong" in capsys.readouterr().out


def test_the_closest_peer_is_faster_than_fp32_and_may_be_wrong(peers, rows):
    others = [row(peers, "quantize_dynamic", 3.9, 40.0), row(peers, "NNCF on ONNX", 3.0, 11.0)]
    cell = next(cell for cell in peers.cells_of([*rows[:2], *others]) if cell.precision == "int8")
    assert (cell.peer.route, cell.closest.route) == ("quantize_dynamic", "NNCF on ONNX")


def test_peers_of_another_runtime_do_not_count(peers, rows):
    elsewhere = [
        row(peers, "quantize_static", 0.1, 40.0, runtime="openvino"),
        row(peers, "torch eager", 0.1, 99.0, "int8", runtime="torch"),
    ]
    cell = next(cell for cell in peers.cells_of(rows + elsewhere) if cell.precision == "int8")
    assert cell.ratio == 0.8


def test_the_picture_has_every_route_in_two_themes_and_is_reproducible(peers, rows, tmp_path):
    path = tmp_path / "picture.svg"
    peers.draw(rows, path)
    text, dark = path.read_text(), (tmp_path / "picture-dark.svg").read_text()
    for route in (peers.OURS, "quantize_static", "ModelOpt"):
        assert route in text and route in dark
    assert "NNCF" not in text and "#0d1117" in dark and "#0d1117" not in text
    peers.draw(rows, path)
    assert path.read_text() == text


def test_a_picture_of_another_kind_is_refused_before_any_work(peers, capsys):
    with pytest.raises(SystemExit):
        peers.main(["--plot", "picture.gif"])
    assert "picture.gif: expected a name that ends in .svg or .png" in capsys.readouterr().err


CRASHING = """
import json, os, signal, sys
from pathlib import Path

job, results = json.loads(sys.argv[2]), Path(sys.argv[3])
for route in ({names}):
    if ["int8", "openvino", route] not in job["crashed"]:
        results.with_suffix(".progress").write_text(json.dumps(["int8", "openvino", route]))
        os.kill(os.getpid(), signal.SIGSEGV)
row = dict(network=job["name"], precision="int8", runtime="openvino", route="deploykit", ms=1.0)
row |= dict(quartiles=[1.0, 1.0], db=30.0, top1=1.0)
results.write_text(json.dumps({{"rows": [row]}}))
"""


def test_a_route_that_crashes_takes_no_other_with_it(peers, tmp_path, monkeypatch):
    child = tmp_path / "child.py"
    child.write_text(CRASHING.format(names='"quantize_static", "ModelOpt"'))
    monkeypatch.setattr(peers, "__file__", str(child))
    rows = peers.in_processes({"name": SMALL}, tmp_path / "rows.json")
    assert [(row.route, row.failure) for row in rows] == [
        (peers.OURS, None),
        ("quantize_static", "crashes the process (SIGSEGV)"),
        ("ModelOpt", "crashes the process (SIGSEGV)"),
    ]
    child.write_text(CRASHING.format(names='"deploykit",'))
    with pytest.raises(SystemExit, match="cannot be measured: its process ended with -11"):
        peers.in_processes({"name": SMALL}, tmp_path / "rows.json")


def test_files_are_built_once_and_a_failure_waits_until_it_is_opened(peers, monkeypatch):
    made = []

    def fail():
        made.append("fails")
        raise ValueError("no such type")

    monkeypatch.setattr(peers, "makers", lambda *cell: {"first": fail, "second": lambda: made.append(cell)})
    peers.build_here("engines", ["int8"])
    assert made == ["fails", ("engines", "onnxruntime", "int8"), "fails", ("engines", "openvino", "int8")]


@pytest.mark.slow
def test_ours_and_the_peers_run_from_the_same_weights(peers, tmp_path, capsys):
    results = tmp_path / "peers.json"
    arguments = [
        "--networks",
        SMALL,
        "--rounds",
        "3",
        "--images",
        "4",
        "--no-compile",
        "--work",
        str(tmp_path / "work"),
    ]
    peers.main([*arguments, "--json", str(results)])
    found = json.loads(results.read_text())
    routes = {(each["precision"], each["runtime"], each["route"]): each for each in found["rows"]}
    for precision, least in (("fp32", 80), ("fp16", 45), ("int8", 12)):
        for runtime in ("onnxruntime", "openvino"):
            assert routes[precision, runtime, "deploykit"]["db"] > least, (precision, runtime)
    assert routes["fp32", "onnxruntime", "torch.onnx.export"]["db"] > 80
    assert routes["int8", "onnxruntime", "quantize_static"]["ms"] > 0
    assert "geometric mean" in capsys.readouterr().out
