"""Bundles in an OCI image layout: as they were, under tags and digests, and whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest

import deploykit
from deploykit.bundle import MANIFEST, open_bundle
from deploykit.errors import BundleError, SpecError, StorageError
from deploykit.shipping import shipment
from deploykit.shipping.oci_layout import ARTIFACT_TYPE, TITLE
from deploykit.shipping.transfer import pull_bundle, pulled_from, push_bundle
from tests.shipping.conftest import content
from tests.test_bundle import leftovers, make


def blob_of(layout: Path, data: bytes) -> Path:
    return layout / "blobs" / "sha256" / hashlib.sha256(data).hexdigest()


def state(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_pulled_bundle_is_the_pushed_one_and_knows_its_revision(bundle, tmp_path):
    pushed = push_bundle(bundle, f"oci:{tmp_path}/models:1.0")
    pulled = pull_bundle(f"oci:{tmp_path}/models:1.0", tmp_path / "pulled")
    assert content(tmp_path / "pulled") == content(bundle)
    assert open_bundle(tmp_path / "pulled") == open_bundle(bundle)
    assert (pulled.revision, pulled.files, pulled.size) == (pushed.revision, pushed.files, pushed.size)
    assert pushed.files == 4
    source = pulled_from(tmp_path / "pulled")
    assert (source.address, source.revision) == (f"oci:{tmp_path}/models:1.0", pushed.revision)
    assert pulled_from(bundle) is None


def test_every_file_is_hashed_once_in_a_pull(bundle, tmp_path, monkeypatch):
    push_bundle(bundle, f"oci:{tmp_path}/store:v1")
    read = []
    original = shipment.digest_of

    def heard(file):
        read.append(os.fstat(file.fileno()).st_ino)
        return original(file)

    monkeypatch.setattr(shipment, "digest_of", heard)
    pull_bundle(f"oci:{tmp_path}/store:v1", tmp_path / "copy")
    assert read
    assert len(read) == len(set(read))


def test_a_pulled_bundle_can_be_replaced_and_pushed_on(bundle, tmp_path):
    first = push_bundle(bundle, f"oci:{tmp_path}/models")
    pull_bundle(first.address, tmp_path / "pulled")
    with pytest.raises(BundleError, match="holds a bundle already"):
        pull_bundle(first.address, tmp_path / "pulled")
    pull_bundle(first.address, tmp_path / "pulled", overwrite=True)
    assert push_bundle(tmp_path / "pulled", f"oci:{tmp_path}/others").revision == first.revision


def test_a_tag_moves_and_the_earlier_bundle_stays_under_its_digest(bundle, tmp_path):
    address = f"oci:{tmp_path}/models:stable"
    first = push_bundle(bundle, address)
    make(bundle, b"another", overwrite=True)
    second = push_bundle(bundle, address)
    push_bundle(bundle, f"oci:{tmp_path}/models:1.1")
    assert first.revision != second.revision
    pull_bundle(address, tmp_path / "new")
    pull_bundle(f"oci:{tmp_path}/models:1.1", tmp_path / "same")
    pull_bundle(first.pinned, tmp_path / "old")
    assert (tmp_path / "new" / "engine.onnx").read_bytes() == b"another"
    assert (tmp_path / "old" / "engine.onnx").read_bytes() == b"engine"
    assert content(tmp_path / "same") == content(tmp_path / "new")
    with pytest.raises(SpecError, match=r"tag 'beta'; its tags: 1\.1, stable"):
        pull_bundle(f"oci:{tmp_path}/models:beta", tmp_path / "beta")


def test_pushing_again_changes_nothing(bundle, tmp_path):
    push_bundle(bundle, f"oci:{tmp_path}/models")
    before = state(tmp_path / "models")
    push_bundle(bundle, f"oci:{tmp_path}/models")
    assert state(tmp_path / "models") == before


def test_another_tool_reads_the_layout(bundle, tmp_path):
    layout_of = pytest.importorskip("oras.layout.layout", reason="oras is not installed")
    pushed = push_bundle(bundle, f"oci:{tmp_path}/models:1.0")
    layout = layout_of.NewLayout(str(tmp_path / "models"))  # which validates it
    blobs = layout.get_ordered_blobs("1.0")
    assert blobs[-1] == pushed.revision
    manifest = json.loads((tmp_path / "models/blobs/sha256" / pushed.revision.removeprefix("sha256:")).read_text())
    assert manifest["artifactType"] == ARTIFACT_TYPE
    assert {layer["annotations"][TITLE] for layer in manifest["layers"]} == set(content(bundle))
    assert set(blobs) == {layer["digest"] for layer in manifest["layers"]} | {
        manifest["config"]["digest"],
        pushed.revision,
    }


def test_what_other_tools_put_into_the_index_stays(bundle, tmp_path):
    push_bundle(bundle, f"oci:{tmp_path}/models:1.0")
    index = tmp_path / "models" / "index.json"
    raw = json.loads(index.read_text())
    foreign = {
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "digest": "sha256:" + "1" * 64,
        "size": 2,
        "platform": {"os": "linux", "architecture": "arm64"},
    }
    index.write_text(json.dumps(raw | {"manifests": [foreign, *raw["manifests"]], "annotations": {"by": "hand"}}))
    push_bundle(bundle, f"oci:{tmp_path}/models:2.0")
    raw = json.loads(index.read_text())
    assert raw["manifests"][0] == foreign
    assert raw["annotations"] == {"by": "hand"}
    with pytest.raises(BundleError, match="manifest"):
        pull_bundle(f"oci:{tmp_path}/models@{foreign['digest']}", tmp_path / "pulled")


@pytest.mark.parametrize("damage", ["changed", "shorter", "missing", "manifest.json", "image manifest", "folder"])
def test_a_damaged_blob_is_refused_before_anything_is_written(bundle, tmp_path, damage):
    pushed = push_bundle(bundle, f"oci:{tmp_path}/models")
    victim = blob_of(tmp_path / "models", (bundle / "weights/engine.bin").read_bytes())
    if damage == "changed":
        victim.write_bytes(b"EVILng" + victim.read_bytes()[6:])
    elif damage == "shorter":
        victim.write_bytes(victim.read_bytes()[:-1])
    elif damage in ("missing", "folder"):
        victim.unlink()
        if damage == "folder":
            victim.mkdir()
    elif damage == "manifest.json":
        blob_of(tmp_path / "models", (bundle / MANIFEST).read_bytes()).write_bytes(b"{}")
    else:
        path = tmp_path / "models/blobs/sha256" / pushed.revision.removeprefix("sha256:")
        path.write_bytes(path.read_bytes().replace(b"engine.onnx", b"engine.on~x"))
    with pytest.raises(BundleError, match="damaged"):
        pull_bundle(pushed.address, tmp_path / "below" / "pulled")
    assert not (tmp_path / "below").exists()


def forged(layout: Path, **changes: object) -> None:
    """Change the image manifest, with digests that fit."""
    index = json.loads((layout / "index.json").read_text())
    descriptor = index["manifests"][0]
    manifest = json.loads((layout / "blobs/sha256" / descriptor["digest"].removeprefix("sha256:")).read_text())
    data = json.dumps(manifest | changes).encode()
    blob_of(layout, data).write_bytes(data)
    descriptor |= {"digest": f"sha256:{hashlib.sha256(data).hexdigest()}", "size": len(data)}
    (layout / "index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "a/../../evil", "", "engine.onnx"])
def test_a_layer_cannot_leave_the_bundle_or_come_twice(bundle, tmp_path, name):
    push_bundle(bundle, f"oci:{tmp_path}/models")
    digest = hashlib.sha256(b"engine").hexdigest()
    layer = {"mediaType": "a/b", "digest": f"sha256:{digest}", "size": 6, "annotations": {TITLE: name}}
    forged(tmp_path / "models", layers=[layer, layer])
    with pytest.raises(BundleError, match="is not a bundle: a layer is called"):
        pull_bundle(f"oci:{tmp_path}/models", tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"artifactType": "application/x-other"}, "its artifact type"),
        ({"layers": []}, "missing"),
        ({"layers": 3}, "does not decode"),
    ],
)
def test_what_is_no_bundle_is_refused(bundle, tmp_path, changes, said):
    push_bundle(bundle, f"oci:{tmp_path}/models")
    forged(tmp_path / "models", **changes)
    with pytest.raises(BundleError, match=said):
        pull_bundle(f"oci:{tmp_path}/models", tmp_path / "pulled")


def test_a_layer_that_the_bundles_manifest_does_not_record_is_refused(bundle, tmp_path):
    push_bundle(bundle, f"oci:{tmp_path}/models")
    blob_of(tmp_path / "models", b"evil").write_bytes(b"evil")
    index = json.loads((tmp_path / "models/index.json").read_text())
    digest = index["manifests"][0]["digest"].removeprefix("sha256:")
    layers = json.loads((tmp_path / "models/blobs/sha256" / digest).read_text())["layers"]
    extra = {"digest": f"sha256:{hashlib.sha256(b'evil').hexdigest()}", "size": 4, "annotations": {TITLE: "extra.so"}}
    forged(tmp_path / "models", layers=[*layers, {"mediaType": "a/b", **extra}])
    with pytest.raises(BundleError, match=r"extra\.so"):
        pull_bundle(f"oci:{tmp_path}/models", tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()


def test_pushing_repairs_a_damaged_blob(bundle, tmp_path):
    push_bundle(bundle, f"oci:{tmp_path}/models")
    blob_of(tmp_path / "models", b"engine").write_bytes(b"damage")
    push_bundle(bundle, f"oci:{tmp_path}/models")
    pull_bundle(f"oci:{tmp_path}/models", tmp_path / "pulled")


def test_a_damaged_bundle_is_not_pushed(bundle, tmp_path):
    (bundle / "engine.onnx").write_bytes(b"damage")
    with pytest.raises(BundleError, match=r"engine\.onnx"):
        push_bundle(bundle, f"oci:{tmp_path}/models")
    assert not (tmp_path / "models").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_said(bundle, tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(StorageError):
        push_bundle(bundle, f"oci:{tmp_path}/closed/models")


def test_a_push_that_fails_leaves_the_layout_as_it_was(bundle, tmp_path, monkeypatch):
    push_bundle(bundle, f"oci:{tmp_path}/models:1.0")
    before = state(tmp_path / "models")
    make(bundle, b"another", overwrite=True)

    def full(handle):
        calls.append(handle)
        if len(calls) == 4:
            raise OSError(28, "No space left on device")

    calls: list[int] = []
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="disk is full"):
        push_bundle(bundle, f"oci:{tmp_path}/models:1.0")
    calls.clear()
    with pytest.raises(StorageError, match="disk is full"):
        push_bundle(bundle, f"oci:{tmp_path}/new:1.0")
    monkeypatch.undo()
    assert state(tmp_path / "models") == before
    assert not (tmp_path / "new").exists()
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("place", ["other files", "a file", "newer layout", "no index"])
def test_a_folder_that_is_no_layout_is_refused(bundle, tmp_path, place):
    target = tmp_path / "models"
    if place == "other files":
        target.mkdir()
        (target / "notes.txt").write_text("mine")
    elif place == "a file":
        target.write_text("mine")
    elif place == "newer layout":
        push_bundle(bundle, f"oci:{target}")
        (target / "oci-layout").write_text('{"imageLayoutVersion":"2.0.0"}')
    else:
        push_bundle(bundle, f"oci:{target}")
        (target / "index.json").write_text("[]")
    for call in (
        lambda: push_bundle(bundle, f"oci:{target}"),
        lambda: pull_bundle(f"oci:{target}", tmp_path / "pulled"),
    ):
        with pytest.raises(SpecError, match=r"layout|folder"):
            call()
    assert not (tmp_path / "pulled").exists()


def test_options_of_the_hub_are_refused(bundle, tmp_path):
    with pytest.raises(SpecError, match="private"):
        push_bundle(bundle, f"oci:{tmp_path}/models", private=True)
    with pytest.raises(SpecError, match="digest"):
        push_bundle(bundle, f"oci:{tmp_path}/models@sha256:{'0' * 64}")
    with pytest.raises(SpecError, match="destination"):
        push_bundle(bundle, tmp_path / "models")
    assert not (tmp_path / "models").exists()


def test_the_functions_are_public():
    assert deploykit.push_bundle is push_bundle
    assert deploykit.pull_bundle is pull_bundle


def test_a_signed_bundle_stays_signed(tmp_path):
    pytest.importorskip("model_signing", reason="model-signing is not installed")
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    from deploykit.signatures import sign_bundle
    from tests.backends.bundles import write_bundle
    from tests.test_signatures import written_key

    bundle = write_bundle(tmp_path / "bundle", "onnxruntime")
    key, other = written_key(tmp_path, "signer"), written_key(tmp_path, "other")
    sign_bundle(bundle, key)
    assert push_bundle(bundle, f"oci:{tmp_path}/models").signed
    pulled = pull_bundle(f"oci:{tmp_path}/models", tmp_path / "pulled", signed_by=key.with_suffix(".pub"))
    assert pulled.signed
    assert deploykit.verify_bundle(tmp_path / "pulled", signed_by=key.with_suffix(".pub")).passed
    assert state(bundle).items() <= state(tmp_path / "pulled").items()
    shutil.rmtree(tmp_path / "pulled")
    with pytest.raises(BundleError, match="not signed by"):
        pull_bundle(f"oci:{tmp_path}/models", tmp_path / "pulled", signed_by=other.with_suffix(".pub"))
    assert not (tmp_path / "pulled").exists()
