"""``deploykit verify``: 0 for a bundle that is whole and within its budget, 1 for any other."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest

from deploykit.bundle import open_bundle, read_manifest, write_manifest


@pytest.fixture
def copy(tmp_path, classifier):
    return shutil.copytree(classifier, tmp_path / "copy")


def test_a_good_bundle_gives_0(call, classifier):
    text, told = call("verify", classifier), call("verify", classifier, "--json")
    assert (text.code, told.code) == (0, 0)
    assert "logits" in text.out
    assert text.out.splitlines()[-1] == f"Next: deploykit run {classifier} IMAGE"
    assert told.json()["passed"] is True
    assert told.json()["report"]["levels"][0]["sqnr_db"] > 80


def test_unreadable_images_are_left_out_where_that_is_asked_for(call, classifier, photos, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"none")
    images = ("--images", photos, "--images", tmp_path / "broken.png")
    refused, passed = call("verify", classifier, *images), call("verify", classifier, *images, "--skip-corrupt")
    assert (refused.code, passed.code) == (2, 0)
    assert "pass --skip-corrupt" in refused.err
    assert "broken.png" in passed.err


def test_numbers_outside_the_budget_give_1(call, copy):
    manifest = read_manifest(copy)
    for name in ("manifest.json", "manifest.sha256"):
        (copy / name).unlink()
    strict = manifest.precision_settings | {"min_sqnr_db": 250.0}
    write_manifest(copy, dataclasses.replace(manifest, precision_settings=strict))
    text, told = call("verify", copy), call("verify", copy, "--json")
    assert (text.code, told.code) == (1, 1)
    assert "OUTSIDE its budget: logits" in text.out
    assert told.json()["passed"] is False


def _expect_other_numbers(folder):
    """The bundle is whole, and torch is said to have given twice what it gave."""
    from deploykit.parity.reference import ParityReference

    reference = ParityReference.load(folder / "reference.npz")
    doubled = {name: values * 2 for name, values in reference.expected.items()}
    dataclasses.replace(reference, expected=doubled).save(folder / "reference.npz")
    manifest = read_manifest(folder)
    for name in ("manifest.json", "manifest.sha256"):
        (folder / name).unlink()
    write_manifest(folder, manifest)


def _set_status(folder, status):
    manifest = read_manifest(folder)
    for name in ("manifest.json", "manifest.sha256"):
        (folder / name).unlink()
    write_manifest(folder, dataclasses.replace(manifest, status=status, seen_on={}))


def test_what_is_seen_on_a_device_is_recorded_where_it_is_asked_for(call, copy):
    _set_status(copy, "built")
    told = call("verify", copy)
    assert told.code == 0
    assert told.out.splitlines()[-1].endswith(f"Next: deploykit verify {copy} --record")
    assert read_manifest(copy).status == "built"
    recorded = call("verify", copy, "--record")
    assert recorded.code == 0
    assert recorded.out.splitlines()[-1] == f"Next: deploykit run {copy} IMAGE"
    manifest = open_bundle(copy)
    assert manifest.status == "parity_checked"
    assert manifest.seen_on["device"] == "cpu"
    assert {"system", "processor", "onnxruntime"} < set(manifest.seen_on)
    assert [path.name for path in copy.parent.iterdir()] == [copy.name]


def test_an_engine_that_ran_outside_its_budget_is_recorded_as_executed(call, copy):
    _expect_other_numbers(copy)
    assert call("verify", copy, "--record").code == 1
    assert open_bundle(copy).status == "executed"
    assert "not all of its outputs are within the budget" in call("inspect", copy).out


def test_debug_without_polygraphy_gives_the_pip_command_and_still_1(call, copy, monkeypatch):
    import sys

    _expect_other_numbers(copy)
    monkeypatch.setitem(sys.modules, "polygraphy", None)
    done = call("verify", copy, "--debug")
    assert done.code == 1
    assert "OUTSIDE its budget" in done.out
    assert "pip install polygraphy" in done.err


def test_debug_says_when_the_runtime_is_not_at_fault(call, copy, tmp_path, monkeypatch):
    for package in ("polygraphy", "onnx_graphsurgeon"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    monkeypatch.chdir(tmp_path)
    _expect_other_numbers(copy)
    done = call("verify", copy, "--debug")
    assert done.code == 1
    assert "one of conversion or quantization" in done.err
    assert not list(tmp_path.glob("*.onnx"))


def _flip(folder):
    content = bytearray((folder / "model.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "model.onnx").write_bytes(content)
    return "model.onnx: SHA-256"


def _remove(folder):
    (folder / "reference.npz").unlink()
    return "reference.npz: missing"


def _newer(folder):
    raw = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(raw | {"schema_version": 99}))
    (folder / "manifest.sha256").unlink()
    return "schema version 99"


@pytest.mark.parametrize("damage", [_flip, _remove, _newer])
@pytest.mark.parametrize("command", ["verify", "inspect", "run"])
def test_a_damaged_bundle_gives_3_and_names_the_file(call, copy, photos, damage, command):
    message = damage(copy)
    done = call(command, copy, *([photos] if command == "run" else []))
    assert (done.code, done.out) == (3, "")
    assert message in done.err


def test_a_damaged_bundle_is_json_too(call, copy):
    _flip(copy)
    told = call("verify", copy, "--json")
    assert told.code == 3
    assert (told.json()["passed"], told.json()["error"]) == (False, "BundleError")


def test_a_folder_that_is_no_bundle_gives_3(call, tmp_path):
    done = call("verify", tmp_path)
    assert done.code == 3
    assert "is not a bundle" in done.err


def test_a_device_that_is_not_here_gives_5(call, classifier):
    done = call("verify", classifier, "--device", "npu")
    assert done.code == 5
    assert "no device 'npu' here" in done.err


def test_a_missing_runtime_gives_the_pip_command(call, classifier, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    done = call("verify", classifier)
    assert done.code == 4
    assert "pip install onnxruntime" in done.err
