"""Bundles in repositories of a model hub: huggingface_hub itself against a server on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from deploykit.bundle import open_bundle, write_manifest
from deploykit.errors import BundleError, SpecError, TransferError
from deploykit.shipping.transfer import pull_bundle, pulled_from, push_bundle
from tests.cli.conftest import call
from tests.shipping.conftest import content
from tests.shipping.hub_server import HubServer
from tests.test_bundle import leftovers, make, manifest

constants = pytest.importorskip("huggingface_hub.constants", reason="huggingface_hub is not installed")

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")  # huggingface_hub's own

HERE = "hf://owner/tiny"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with HubServer() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 34)
        yield server


def test_a_pulled_bundle_is_the_pushed_one_and_knows_its_commit(hub, bundle, tmp_path):
    pushed = push_bundle(bundle, HERE, message="The first", private=True)
    assert hub.private == {"owner/tiny"}
    assert {name: data for name, data in hub.files("owner/tiny").items() if name != ".gitattributes"} == content(bundle)
    assert any("/lfs/" in request for request in hub.requests), "no file went through the large-file protocol"
    pulled = pull_bundle(HERE, tmp_path / "pulled")
    assert content(tmp_path / "pulled") == content(bundle)
    assert pushed.revision == pulled.revision == hub.sha("owner/tiny")
    assert pulled_from(tmp_path / "pulled").revision == pushed.revision
    assert pushed.pinned == f"{HERE}@{pushed.revision}"


def test_a_push_replaces_in_one_commit_and_the_earlier_stays_by_its_hash(hub, bundle, tmp_path):
    first = push_bundle(bundle, HERE)
    hub.files("owner/tiny")["README.md"] = b"# Tiny"
    (bundle / "weights").rename(tmp_path / "old-weights")
    (bundle / "manifest.json").unlink()
    (bundle / "manifest.sha256").unlink()
    write_manifest(bundle, manifest())
    second = push_bundle(bundle, HERE)
    assert set(hub.files("owner/tiny")) == {*content(bundle), ".gitattributes", "README.md"}
    assert sum("/commit/" in request for request in hub.requests) == 2
    pull_bundle(first.pinned, tmp_path / "old")
    pull_bundle(second.pinned, tmp_path / "new")
    assert (tmp_path / "old" / "weights" / "engine.bin").exists()
    assert open_bundle(tmp_path / "new") == open_bundle(bundle)


def test_several_bundles_lie_in_folders_and_branches_of_one_repository(hub, bundle, tmp_path):
    push_bundle(bundle, f"{HERE}/cpu")
    make(bundle, b"another", overwrite=True)
    push_bundle(bundle, f"{HERE}/gpu")
    make(bundle, b"branch", overwrite=True)
    push_bundle(bundle, f"{HERE}@v2")
    engines = {}
    for address in (f"{HERE}/cpu", f"{HERE}/gpu", f"{HERE}@v2", f"{HERE}@v2/cpu"):
        pull_bundle(address, tmp_path / "pulled", overwrite=True)
        engines[address] = (tmp_path / "pulled" / "engine.onnx").read_bytes()
    assert list(engines.values()) == [b"engine", b"another", b"branch", b"engine"]
    assert "engine.onnx" not in hub.files("owner/tiny")


def test_files_that_are_no_bundles_are_not_mixed_with(hub, bundle):
    push_bundle(bundle, f"{HERE}/cpu")
    hub.files("owner/tiny")["model.safetensors"] = b"weights"
    with pytest.raises(SpecError, match=r"no bundle's: model\.safetensors"):
        push_bundle(bundle, HERE)
    assert hub.files("owner/tiny")["model.safetensors"] == b"weights"


@pytest.mark.parametrize("name", ["engine.onnx", "weights/engine.bin", "manifest.json", "manifest.sha256"])
def test_a_changed_file_is_refused_before_anything_is_written(hub, bundle, tmp_path, name):
    push_bundle(bundle, HERE)
    files = hub.files("owner/tiny")
    files[name] = bytes([files[name][0] ^ 1]) + files[name][1:]
    with pytest.raises(BundleError, match=r"damaged|is not JSON"):
        pull_bundle(HERE, tmp_path / "below" / "pulled")
    del files[name]
    with pytest.raises(BundleError, match=r"missing|is not a bundle"):
        pull_bundle(HERE, tmp_path / "below" / "pulled")
    assert not (tmp_path / "below").exists()


def test_a_file_damaged_in_the_hubs_cache_is_downloaded_again(hub, bundle, tmp_path):
    push_bundle(bundle, HERE)
    pull_bundle(HERE, tmp_path / "first")
    [cached] = Path(constants.HF_HUB_CACHE).rglob("snapshots/*/engine.onnx")
    cached.resolve().write_bytes(b"damage")
    pull_bundle(HERE, tmp_path / "second")
    assert content(tmp_path / "second") == content(bundle)


def test_a_refused_commit_leaves_what_was_there(hub, bundle, tmp_path):
    push_bundle(bundle, HERE)
    before = dict(hub.files("owner/tiny"))
    make(bundle, b"another", overwrite=True)
    hub.broken_commits = True
    with pytest.raises(TransferError, match="cannot be pushed to"):
        push_bundle(bundle, HERE)
    assert hub.files("owner/tiny") == before
    hub.forbidden = True
    with pytest.raises(TransferError, match="hf auth login"):
        push_bundle(bundle, HERE)


def test_names_that_are_not_there_are_said(hub, bundle, tmp_path):
    push_bundle(bundle, HERE)
    with pytest.raises(SpecError, match="no repository owner/other"):
        pull_bundle("hf://owner/other", tmp_path / "pulled")
    with pytest.raises(SpecError, match="revision"):
        pull_bundle(f"{HERE}@v9", tmp_path / "pulled")
    with pytest.raises(BundleError, match=r"is not a bundle: it has no manifest\.json, but no files"):
        pull_bundle(f"{HERE}/gpu", tmp_path / "pulled")
    with pytest.raises(SpecError, match="names a commit"):
        push_bundle(bundle, f"{HERE}@{'0' * 40}")
    assert leftovers(tmp_path) == []


def test_a_hub_that_is_not_reached_is_said(bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for transfer in (lambda: push_bundle(bundle, HERE), lambda: pull_bundle(HERE, tmp_path / "pulled")):
        with pytest.raises(TransferError, match="HF_ENDPOINT"):
            transfer()


def test_the_endpoint_is_that_of_the_environment(hub, bundle):
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "deploykit", "push", bundle, HERE, "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["revision"] == hub.sha("owner/tiny")


def test_the_commands_say_the_revision_and_end_as_others_do(hub, bundle, tmp_path, monkeypatch):
    pushed = call("push", bundle, HERE)
    revision = hub.sha("owner/tiny")
    assert pushed.code == 0, pushed.err
    assert f"Next: deploykit pull {HERE}@{revision} -o FOLDER" in pushed.out
    pulled = call("pull", HERE, "-o", tmp_path / "pulled")
    assert f"Revision {revision}; {HERE}@{revision} always gives these bytes." in pulled.out
    assert content(tmp_path / "pulled") == content(bundle)
    assert f"Pulled from {HERE}, revision {revision}." in call("inspect", tmp_path / "pulled").out
    assert call("pull", HERE, "-o", tmp_path / "pulled").code == 3
    assert call("pull", f"{HERE}@v9", "-o", tmp_path / "again").code == 2
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    hub.files("owner/tiny")["engine.onnx"] = b"damage"
    failed = call("pull", HERE, "-o", tmp_path / "again", "--json")
    assert (failed.code, failed.json()["error"]) == (3, "BundleError")
    hub.forbidden = True
    assert call("push", bundle, HERE).code == 6
