"""Image layouts with odd files in them: each is named, whether by an error of its own or as damage."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from deploykit.errors import BundleError, SpecError, StorageError
from deploykit.shipping import oci_layout
from deploykit.shipping.shipment import arrived_manifest
from deploykit.shipping.transfer import pull_bundle, push_bundle


@pytest.fixture
def layout(bundle, tmp_path) -> Path:
    push_bundle(bundle, f"oci:{tmp_path}/models")
    return tmp_path / "models"


def pull(layout: Path) -> None:
    pull_bundle(f"oci:{layout}", layout.with_name("pulled"))


def described(layout: Path, **changes: object) -> None:
    """Change what the index says of the bundle."""
    index = json.loads((layout / "index.json").read_text())
    index["manifests"][0] |= changes
    (layout / "index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("oci-layout", r"oci-layout cannot be read as that of an OCI image layout"),
        ("index.json", r"index\.json cannot be read: .*Give a whole OCI image layout"),
    ],
)
def test_a_folder_for_a_file_of_the_layout_is_named(layout, name, said):
    (layout / name).unlink()
    (layout / name).mkdir()
    with pytest.raises(SpecError, match=said):
        pull(layout)


def test_a_layout_without_an_index_has_no_tags(layout):
    (layout / "index.json").unlink()
    with pytest.raises(SpecError, match="its tags: none"):
        pull(layout)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mediaType": "application/vnd.oci.image.index.v1+json"}, "is not a bundle: its type is"),
        ({"digest": "sha512:" + "0" * 64}, "is not a bundle: it names a blob 'sha512"),
        ({"digest": "sha256:../../evil"}, "is not a bundle: it names a blob"),
        ({"digest": "sha256:" + "0" * 64}, r"(?s)damaged.*its manifest sha256:0+: missing"),
        ({"size": 3}, r"(?s)damaged.*its manifest does not have the digest"),
    ],
    ids=str,
)
def test_an_entry_of_the_index_that_is_no_bundle_is_named(layout, changes, said):
    described(layout, **changes)
    with pytest.raises(BundleError, match=said):
        pull(layout)
    assert not layout.with_name("pulled").exists()


def test_a_folder_for_the_image_manifest_is_damage(layout):
    digest = json.loads((layout / "index.json").read_text())["manifests"][0]["digest"].removeprefix("sha256:")
    path = layout / "blobs" / "sha256" / digest
    path.unlink()
    path.mkdir()
    with pytest.raises(BundleError, match=r"(?s)damaged.*its manifest sha256:\S+: "):
        pull(layout)


@pytest.mark.parametrize(
    ("number", "error", "said"),
    [
        (errno.EMFILE, StorageError, "cannot be read.*Raise the limit"),
        (errno.ELOOP, BundleError, "cannot be read: .*Check the path"),
    ],
)
def test_an_error_of_the_machine_is_told_from_one_of_the_path(layout, monkeypatch, number, error, said):
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(oci_layout, "read_plain", refuse)
    with pytest.raises(error, match=said):
        pull(layout)


def test_what_a_killed_push_left_goes_at_the_next(layout, bundle):
    left = layout / ".0011223344556677.deploykit-partial"
    left.write_bytes(b"half")
    push_bundle(bundle, f"oci:{layout}")
    assert not left.exists()
    pull(layout)


def test_a_file_that_is_replaced_while_it_is_pushed_is_refused(bundle, tmp_path, monkeypatch):
    copy = oci_layout.shutil.copyfileobj

    def replaced(source, target, length):
        copy(source, target, length)
        target.write(b"!")

    monkeypatch.setattr(oci_layout.shutil, "copyfileobj", replaced)
    with pytest.raises(BundleError, match=r"was replaced while it was pushed\. Fix: push the bundle again"):
        push_bundle(bundle, f"oci:{tmp_path}/models")
    assert not (tmp_path / "models").exists()


def test_an_image_manifest_without_end_is_damage(layout):
    digest = json.loads((layout / "index.json").read_text())["manifests"][0]["digest"].removeprefix("sha256:")
    with (layout / "blobs" / "sha256" / digest).open("ab") as file:
        file.truncate(1 << 30)
    with pytest.raises(BundleError, match=r"(?s)damaged.*its manifest sha256:\S+: .*expected at most"):
        pull(layout)


def test_a_bundles_manifest_without_end_is_damage(bundle):
    with (bundle / "manifest.json").open("ab") as file:
        file.truncate(1 << 30)
    with pytest.raises(BundleError, match=r"(?s)damaged.*manifest\.json.*expected at most"):
        arrived_manifest({name: bundle / name for name in ("manifest.json", "manifest.sha256")}, "oci:models")
