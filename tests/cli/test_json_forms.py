"""``--json`` of commands that otherwise print a few lines, and the lines themselves."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest

from deploykit.bundle import read_manifest, write_manifest
from deploykit.bundle_files import PLAN_FILE
from deploykit.store_folder import PARTIAL
from tests.export.test_imported_graphs import PAIR, POOLED, WEIGHT, write

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A bundle that opens and runs in no time."""
    from tests.backends.bundles import write_bundle

    return write_bundle(tmp_path_factory.mktemp("small") / "bundle", "onnxruntime")


def changed(bundle, folder, plan=None, **manifest):
    """A copy of a bundle with another manifest, and another quantization plan."""
    copy = shutil.copytree(bundle, folder)
    if plan is not None:
        (copy / PLAN_FILE).write_text(plan)
    before = read_manifest(copy)
    for name in ("manifest.json", "manifest.sha256"):
        (copy / name).unlink()
    write_manifest(copy, dataclasses.replace(before, **manifest))
    return copy


def test_a_comparison_is_the_same_in_its_file(call, classifier, tmp_path):
    done = call("compare", classifier, classifier, "--json", "-o", tmp_path / "compare.json")
    assert done.code == 0, done.err
    assert done.json() == json.loads((tmp_path / "compare.json").read_text())
    assert done.json()["passed"] is True


def test_a_push_and_a_pull_name_the_revision(call, small, tmp_path):
    pushed = call("push", small, f"oci:{tmp_path}/models", "--json")
    assert pushed.code == 0, pushed.err
    pulled = call("pull", f"oci:{tmp_path}/models", "-o", tmp_path / "pulled", "--json")
    assert pulled.code == 0, pulled.err
    assert pulled.json()["revision"] == pushed.json()["revision"]
    assert pulled.json()["signed"] is False


def test_a_repository_lists_its_files(call, small, tmp_path):
    done = call("repository", small, "--layout", "triton", "-o", tmp_path / "models", "--name", "tiny", "--json")
    assert done.code == 0, done.err
    assert all((tmp_path / "models" / "tiny" / name).is_file() for name in done.json()["files"])


def test_a_signature_is_named(call, small, tmp_path):
    pytest.importorskip("model_signing", reason="model-signing is not installed")
    from tests.test_signatures import written_key

    copy = shutil.copytree(small, tmp_path / "copy")
    done = call("sign", copy, "--key", written_key(tmp_path, "signer"), "--json")
    assert (done.code, done.json()) == (0, {"bundle": str(copy), "signature": str(copy / "model.sig")})


def test_a_tuning_that_is_forgotten_says_so(call, small):
    done = call("tune", small, "--forget", "--json")
    assert (done.code, done.json()) == (0, {"bundle": str(small), "forgotten": True})


def test_an_extraction_counts_its_rows(call, small, photos, tmp_path):
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    done = call("extract", photos, "--bundle", small, "-o", tmp_path / "out.parquet", "--json")
    assert done.code == 0, done.err
    assert (done.json()["rows"], done.json()["skipped"]) == (4, 0)


def test_a_cache_with_what_ended_processes_left_says_how_many(call, tmp_path, monkeypatch):
    monkeypatch.setenv("DEPLOYKIT_CACHE", str(tmp_path / "cache"))
    kind = tmp_path / "cache" / "engines"
    kind.mkdir(parents=True)
    (kind / f".{'0' * 64}.0123abcd{PARTIAL}").mkdir()
    done = call("cache", "list")
    assert done.code == 0, done.err
    assert "1 files and folders were left by ended processes or earlier versions." in done.out
    assert done.out.splitlines()[-1] == "Next: deploykit cache prune"


def test_an_imported_model_names_what_is_in_float_and_what_has_no_place(call, tmp_path):
    again = "q2 = QuantizeLinear (images, other, zero)  dq2 = DequantizeLinear (q2, other, zero)"
    layers = "first = Conv (dq, weight)  second = Conv (dq2, weight)  third = Conv (images, real)"
    body = f"{PAIR}  {again}  {WEIGHT}  {layers}  two = Add (first, second)  maps = Add (two, third)  scores = {POOLED}"
    words = ("import", write(tmp_path, body), "--runtime", "onnxruntime", "--min-sqnr-db", "0")
    done = call(*words, "-o", tmp_path / "text")
    assert done.code == 0, done.err
    assert "2 layers in integers, 1 in float." in done.out
    assert "in float: Conv7: its weight is in float in the imported model" in done.out
    assert "Quantizers without a place in the plan: QuantizeLinear2: images has another scale already" in done.out
    told = call(*words, "-o", tmp_path / "json", "--json").json()
    assert told["float_nodes"] == {"Conv7": "its weight is in float in the imported model"}
    assert told["status"] == "parity_checked"


PLAN = {
    "calibrator": "mse",
    "images": 16,
    "placement": {"weights": {"a": 1}, "float_nodes": {f"n{index}": "its range" for index in range(30)}},
    "ranges": {},
}


def test_the_page_of_a_bundle_counts_the_float_nodes_that_it_does_not_show(call, small, tmp_path):
    copy = changed(small, tmp_path / "copy", json.dumps(PLAN), precision="int8")
    done = call("inspect", copy)
    assert done.code == 0, done.err
    assert f"more: see {PLAN_FILE}" in done.out
    assert "noisiest" not in done.out


def test_a_file_that_is_no_plan_is_a_bad_bundle(call, small, tmp_path):
    done = call("inspect", changed(small, tmp_path / "copy", "{}", precision="int8"))
    assert done.code == 3
    assert f"{PLAN_FILE} is not a quantization plan" in done.err


def test_the_page_of_a_runtime_that_is_not_known_here_is_shown(call, small, tmp_path):
    done = call("inspect", changed(small, tmp_path / "copy", runtime="another"), "--json")
    assert done.code == 0, done.err
    assert (done.json()["manifest"]["runtime"], done.json()["tuned_here"]) == ("another", [])
