"""What is measured best for an engine is remembered for this machine, and used by whoever gives no threads."""

from __future__ import annotations

import dataclasses
import logging
import pickle

import numpy as np
import platformdirs
import pytest

import deploykit.tune as tune_module
from deploykit.backends.table import load_backend
from deploykit.backends.tuning import Tuning, forget, remember, remembered
from deploykit.bundle import read_manifest
from deploykit.errors import SpecError
from deploykit.loading import load_bundle
from deploykit.tune import tune
from tests.backends.bundles import write_bundle
from tests.cli.conftest import call
from tests.conftest_graphs import photographs

RUNTIMES = ("onnxruntime", "openvino")
FOUND = Tuning(hint="throughput", threads=2, streams=2, in_flight=5, unit="images/s", default=10, best=20, gain=2.0)


@pytest.fixture(scope="module", params=RUNTIMES)
def bundle(request, tmp_path_factory):
    pytest.importorskip(request.param, reason=f"{request.param} is not installed")
    return write_bundle(tmp_path_factory.mktemp("tuned") / "bundle", request.param)


@pytest.fixture
def found(bundle):
    """The bundle, for which throughput was tuned."""
    manifest, backend = read_manifest(bundle), load_backend(read_manifest(bundle).runtime)
    remember(manifest, backend, "auto", FOUND)
    yield bundle
    forget(manifest, backend, "auto", "throughput")


def test_it_opens_as_was_measured_best_and_says_so(found, caplog):
    with caplog.at_level(logging.INFO, "deploykit.backends.tuning"), load_bundle(found, hint="throughput") as model:
        assert (model.tuned, model.threads, model.streams, model.in_flight) == (FOUND, 2, 2, 5)
        assert "in flight 5" in repr(model)
        assert "measured 2.00 times as good as the default for throughput" in caplog.text
        images = photographs(2)
        with load_bundle(found, tuned=False) as plain:
            streamed = list(model.stream([images, images]))
            for name, level in plain(images).items():
                assert np.array_equal(streamed[1][name], level) or np.allclose(streamed[1][name], level, atol=1e-4)


def test_opening_says_nothing_of_a_cache_that_there_is_not(bundle, monkeypatch, caplog):
    monkeypatch.delenv("DEPLOYKIT_CACHE")
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda name: "~nobody-of-this-name/cache")
    with load_bundle(bundle) as model:
        assert model.tuned is None
    assert "cache" not in caplog.text


def test_the_settings_reach_the_runtime(found):
    with load_bundle(found, hint="throughput") as model:
        if model.runtime == "openvino":
            assert model._compiled.get_property("NUM_STREAMS") == 2
            assert model._compiled.get_property("INFERENCE_NUM_THREADS") == 2
        else:
            assert model._session.get_session_options().intra_op_num_threads == 1


@pytest.mark.parametrize("options", [{"threads": 1, "hint": "throughput"}, {}, {"hint": "throughput", "tuned": False}])
def test_whoever_asks_for_something_else_gets_it(found, options):
    with load_bundle(found, **options) as model:
        assert model.tuned is None
        assert model.in_flight != 5


def test_a_copy_is_opened_as_its_original(found):
    with load_bundle(found, hint="throughput") as model, pickle.loads(pickle.dumps(model)) as copy:  # noqa: S301
        assert copy.tuned == FOUND


def test_another_engine_device_or_machine_is_not_affected(found, monkeypatch):
    manifest, backend = read_manifest(found), load_backend(read_manifest(found).runtime)
    assert remembered(manifest, backend, "auto", "throughput") == FOUND
    assert remembered(manifest, backend, "auto", "latency") is None
    assert remembered(manifest, backend, "gpu", "throughput") is None
    records = {name: dataclasses.replace(file, sha256="0" * 64) for name, file in manifest.files.items()}
    assert remembered(dataclasses.replace(manifest, files=records), backend, "auto", "throughput") is None
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = remembered(manifest, backend, "auto", "throughput")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    after = remembered(manifest, backend, "auto", "throughput")
    assert None in (before, after)


def test_what_is_kept_is_a_gain_that_was_seen_again(bundle, monkeypatch):
    """Figures stand in for times here: one candidate is twice as fast in the first measurement."""
    rounds = []

    def figures(models, images, seconds):
        assert all(model(images) for model in models)
        rounds.append(len(models))
        first = len(rounds) == 1
        return [[10.0] * 3, *([5.0 if first or seen_again else 10.0] * 3 for _ in models[1:])]

    monkeypatch.setattr(tune_module, "_rounds", figures)
    for seen_again in (True, False):
        rounds.clear()
        [result] = tune(bundle, hints=["latency"], threads=[1, 2], seconds=0.01)
        assert rounds == [3, 2]
        assert [(trial.threads, trial.gain) for trial in result.trials] == [(1, 2.0), (2, 2.0)]
        with load_bundle(bundle) as model:
            assert model.tuned == result.kept
            assert (result.kept is not None) == seen_again
            assert model.threads == 1 or not seen_again


def test_the_command_measures_and_keeps(bundle, monkeypatch):
    done = call("tune", bundle, "--seconds", "0.02", "--streams", "1,2", "--in-flight", "2", "--threads", "2", "--json")
    assert done.code == 0, done.err
    latency, throughput = done.json()["results"]
    assert (latency["unit"], throughput["unit"]) == ("ms", "images/s")
    assert [(each["streams"], each["in_flight"]) for each in throughput["trials"]] == [(1, 2), (2, 2)]
    assert all(each["figure"] > 0 for each in (*latency["trials"], *throughput["trials"]))
    monkeypatch.setattr(tune_module, "LEAST_GAIN", 0.0)
    done = call("tune", bundle, "--seconds", "0.02", "--hint", "latency")
    assert "Kept for latency: threads" in done.out
    assert "Tuned here: opened with threads" in call("inspect", bundle).out
    assert "tuned: " in call("bench", bundle, "--seconds", "0.01").err
    assert call("tune", bundle, "--forget").code == 0
    assert "Tuned here" not in call("inspect", bundle).out
    assert "tuned: " not in call("bench", bundle, "--seconds", "0.01").err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"hints": ["speed"]}, "hint"),
        ({"threads": [0]}, "threads is 0"),
        ({"threads": []}, "threads is empty"),
        ({"in_flight": [0]}, "in_flight is 0"),
        ({"streams": [True]}, "streams is True"),
        ({"seconds": 0.0}, "seconds"),
        ({"threads": 2}, "threads"),
    ],
)
def test_what_is_no_setting_is_refused(bundle, options, said):
    with pytest.raises(SpecError, match=said):
        tune(bundle, **options)


@pytest.mark.parametrize(("tunable", "said"), [((), "in one way"), (("threads",), "has no streams to tune")])
def test_a_runtime_without_the_setting_says_so(bundle, monkeypatch, tunable, said):
    backend = dataclasses.replace(load_backend(read_manifest(bundle).runtime), tunable=tunable)
    monkeypatch.setattr(tune_module, "backend_of", lambda manifest: backend)
    with pytest.raises(SpecError, match=said):
        tune(bundle, streams=[2])
