"""``deploykit bench``: one row a bundle, a batch and a number of threads; and what it refuses."""

from __future__ import annotations

import pytest

from tests.accuracy.small_classifier import export


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return export(tmp_path_factory.mktemp("bundles") / "engine")


def test_every_case_has_its_figures(call, bundle):
    words = ("--threads", "1,2", "--batch-size", "1,3", "--seconds", "0.02", "--json")
    told = call("bench", bundle, bundle, *words).json()
    cases = [(each["bundle"], each["threads"], each["batch"]) for each in told["results"]]
    assert cases == [("engine", count, batch) for count in (1, 2) for batch in (1, 3) for _ in range(2)]
    for each in told["results"]:
        assert 0 < each["p50_ms"] <= each["p90_ms"] <= each["p99_ms"]
        assert each["calls"] >= 10
        assert each["images_per_s"] > 0
        assert each["load_ms"] > 0
        assert each["first_ms"] > 0
        assert (each["hint"], each["in_flight"]) == ("latency", 2)
    assert "processor" in told["machine"]


def test_the_table_names_what_was_timed(call, bundle):
    done = call("bench", bundle, "--seconds", "0.01", "--hint", "throughput", "--threads", "2")
    assert done.code == 0, done.err
    assert "Opened for throughput" in done.out
    assert "p99 ms" in done.out
    assert "bench: open engine" in done.err


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_a_plot_shows_every_case(call, bundle, tmp_path, suffix):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    path = tmp_path / f"bench{suffix}"
    done = call("bench", bundle, bundle, "--seconds", "0.01", "--plot", path)
    assert done.code == 0, done.err
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG" if suffix == ".png" else b"<?xml")
    if suffix == ".svg":
        assert content.count(b"<!-- engine -->") == 2 and b"images a second" in content


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--batch-size", "9999"), "takes a batch of"),
        (("--batch-size", "two"), "whole numbers"),
        (("--threads", "0"), "threads is 0"),
        (("--hint", "speed"), "expected 'latency' or 'throughput'"),
        (("--seconds", "0"), "above 0"),
        (("--plot", "bench.pdf"), "ends in .png or .svg"),
        (("--plot", "nowhere/bench.svg"), "a folder that exists"),
        (("--image-size", "40"), "one size, 32x32"),
    ],
)
def test_bad_usage(call, bundle, words, message):
    done = call("bench", bundle, *words)
    assert (done.code, message in done.err) == (2, True), done.err
