"""The engines of the store: bundles that are what was asked for."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import pytest

from deploykit.bundle import Manifest, open_bundle
from deploykit.cache import EngineCache
from deploykit.errors import BundleError
from deploykit.store import Store
from tests.test_bundle import make, manifest, tamper

PARTS = {"name": "tiny"}


@pytest.fixture
def cache(tmp_path: Path) -> EngineCache:
    return EngineCache(Store(tmp_path / "cache"))


def never(folder: Path) -> None:
    raise AssertionError(f"{folder} was built again")


def test_a_bundle_is_built_once_and_then_found(cache):
    with cache.opened(PARTS, make, title="tiny") as folder:
        written = open_bundle(folder)
        assert cache.root in folder.parents
    with cache.opened(PARTS, never, title="tiny") as again:
        assert (again, open_bundle(again)) == (folder, written)


def test_a_corrupt_entry_is_rebuilt_with_a_warning(cache, caplog):
    with cache.opened(PARTS, make, title="tiny") as folder:
        (folder / "engine.onnx").write_bytes(b"wrong!")
    with caplog.at_level(logging.WARNING, logger="deploykit"), cache.opened(PARTS, make, title="tiny") as folder:
        open_bundle(folder)
    assert "made again" in caplog.text
    assert "bundle/engine.onnx" in caplog.text


def test_an_engine_that_is_not_what_was_asked_for_is_rebuilt(cache, caplog):
    """Also where the entry and its bundle are whole."""

    def differs(found: Manifest) -> str | None:
        return None if found.weights_digest == "cd" * 32 else "it has other weights"

    def build(folder: Path) -> None:
        make(folder)
        tamper(folder, weights_digest="cd" * 32)

    with cache.opened(PARTS, make, title="tiny"):
        pass
    with cache.opened(PARTS, build, title="tiny", expected=differs) as folder:
        assert open_bundle(folder) == dataclasses.replace(
            manifest(), weights_digest="cd" * 32, files=open_bundle(folder).files
        )
    assert "other weights" in caplog.text
    with cache.opened(PARTS, never, title="tiny", expected=differs):
        pass


def test_a_build_that_leaves_no_bundle_is_not_found_again(cache):
    with cache.opened(PARTS, lambda folder: None, title="tiny") as folder, pytest.raises(BundleError):
        open_bundle(folder)
    with cache.opened(PARTS, make, title="tiny") as folder:
        open_bundle(folder)
