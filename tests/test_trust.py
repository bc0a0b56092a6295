"""Machine code that this user did not make here is told, refused, or opened in silence, as the caller says."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path

import pytest

from deploykit.backends.table import BACKENDS, load_backend
from deploykit.errors import TrustWarning, UntrustedEngine
from deploykit.manifest import FileRecord, Manifest
from deploykit.trust import check_trust, is_own, remember_engine
from tests.conftest_graphs import manifest_of, tiny_graph

FILES = {"model.pt2": FileRecord(size=5, sha256="a" * 64)}


@pytest.fixture(autouse=True)
def own_store(tmp_path, monkeypatch):
    monkeypatch.setenv("DEPLOYKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("deploykit.trust._made_here", set())


@pytest.fixture
def manifest() -> Manifest:
    from deploykit.backends.backend import Engine

    engine = Engine(file="model.pt2", runtime_version="1")
    return dataclasses.replace(manifest_of("torch_compile", tiny_graph(), engine), files=FILES)


def test_code_from_elsewhere_is_opened_with_a_warning(tmp_path):
    with pytest.warns(TrustWarning, match=r"holds machine code \(model\.pt2\) that was not made by this user"):
        check_trust(tmp_path, "model.pt2", FILES, None)


def test_code_from_elsewhere_is_refused_where_nothing_else_is_trusted(tmp_path):
    with pytest.raises(UntrustedEngine, match="It is not opened"):
        check_trust(tmp_path, "model.pt2", FILES, False)


def test_the_users_word_is_enough(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_trust(tmp_path, "model.pt2", FILES, True)


def test_what_this_user_made_asks_nothing_in_a_later_process(manifest, tmp_path, monkeypatch):
    remember_engine(manifest)
    monkeypatch.setattr("deploykit.trust._made_here", set())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for trust in (None, False):
            check_trust(tmp_path, "model.pt2", FILES, trust)


def test_without_a_store_this_process_remembers(manifest, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("DEPLOYKIT_CACHE", str(tmp_path / "file" / "cache"))
    remember_engine(manifest)
    assert is_own("model.pt2", FILES)


@pytest.mark.parametrize(
    "change",
    [
        {"model.pt2": FileRecord(size=5, sha256="b" * 64)},
        FILES | {"model.pt2.data": FileRecord(size=1, sha256="c" * 64)},
    ],
)
def test_another_engine_or_one_more_file_is_not_the_users_own(manifest, change):
    remember_engine(manifest)
    assert not is_own("model.pt2", change)


def test_an_entry_that_another_user_could_write_proves_nothing(manifest, tmp_path, monkeypatch):
    remember_engine(manifest)
    monkeypatch.setattr("deploykit.trust._made_here", set())
    (entry,) = [path for path in Path(tmp_path / "cache" / "own-engines").iterdir() if not path.name.startswith(".")]
    entry.chmod(0o777)
    assert not is_own("model.pt2", FILES)


def test_the_table_says_which_engines_are_code():
    code = {name for name in BACKENDS if load_backend(name).code_suffix is not None}
    assert code == {"torch_compile", "tensorrt"}
    assert load_backend("tensorrt").is_code("model.plan")
    assert not load_backend("tensorrt").is_code("model.onnx")  # a portable bundle
