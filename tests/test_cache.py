from __future__ import annotations

import logging
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from deploykit.bundle import open_bundle
from deploykit.cache import ENVIRONMENT, EngineCache
from deploykit.errors import BundleError, SpecError
from deploykit.spec import Fp16, Fp32, Int8
from tests.test_bundle import ROOT, make


@pytest.fixture
def cache(tmp_path: Path) -> EngineCache:
    return EngineCache(tmp_path / "cache")


def never(folder: Path) -> None:
    raise AssertionError(f"{folder} was built again")


def test_a_key_is_the_same_in_every_process_and_order(cache):
    precision = Int8().filled()
    parts = {"name": "resnet50", "precision": precision, "shape": (1, 3, 224, 224), "options": {"b": 1.5, "a": None}}
    key = cache.key(parts)
    assert key == cache.key(dict(reversed(parts.items())))
    assert key == cache.key(parts | {"shape": [1, 3, 224, 224]})
    code = """
    from deploykit.cache import EngineCache
    from deploykit.spec import Int8
    precision = Int8().filled()
    parts = {"name": "resnet50", "precision": precision, "shape": (1, 3, 224, 224), "options": {"a": None, "b": 1.5}}
    print(EngineCache().key(parts))
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7"}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    assert subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip() == key


def test_every_difference_makes_another_key(cache):
    parts = [
        {"a": 1},
        {"a": 1.0},
        {"a": True},
        {"a": "1"},
        {"a": None},
        {"a": [1]},
        {"a": {"1": 1}},
        {"b": 1},
        {},
        {"a": Fp32(min_sqnr_db=45.0)},
        {"a": Fp16(min_sqnr_db=45.0)},
        {"a": Int8(percentile=99.0).filled()},
    ]
    assert len({cache.key(each) for each in parts}) == len(parts)


@pytest.mark.parametrize("value", [Path("weights.pth"), b"bytes", {1, 2}, {1: 2}, object(), [1, {"x": len}], Int8()])
def test_a_part_without_a_stable_text_is_refused_by_name(cache, value):
    with pytest.raises(SpecError, match=r"parts\.weights"):
        cache.key({"weights": value})


@pytest.mark.parametrize("key", ["", "../x", "ab", "A" * 64, "0" * 65])
def test_a_key_from_elsewhere_is_refused(cache, key):
    with pytest.raises(SpecError, match="64 hex digits"):
        cache.get_or_build(key, never)


def test_an_engine_is_built_once_and_then_found(cache):
    key = cache.key({"name": "tiny"})
    entry = cache.get_or_build(key, make)
    open_bundle(entry)
    assert cache.get_or_build(key, never) == entry
    assert EngineCache(cache.root).get_or_build(key, never) == entry
    assert cache.get_or_build(cache.key({"name": "other"}), make) != entry


def test_a_corrupt_entry_is_rebuilt_with_a_warning(cache, caplog):
    key = cache.key({"name": "tiny"})
    entry = cache.get_or_build(key, make)
    (entry / "engine.onnx").write_bytes(b"wrong!")
    with caplog.at_level(logging.WARNING, logger="deploykit"):
        assert cache.get_or_build(key, make) == entry
    assert "is rebuilt" in caplog.text
    assert "engine.onnx" in caplog.text
    open_bundle(entry)


def test_a_failed_build_leaves_no_entry_and_no_lock(cache):
    key = cache.key({"name": "tiny"})
    with pytest.raises(AssertionError, match="built again"):
        cache.get_or_build(key, never)
    with pytest.raises(BundleError, match="no bundle at"):
        cache.get_or_build(key, lambda _: None)
    open_bundle(cache.get_or_build(key, make))


def test_two_processes_build_once(cache, tmp_path):
    code = """
    import sys, time
    from pathlib import Path
    from deploykit.cache import EngineCache
    from tests.test_bundle import make

    root, log, start = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])

    def build(folder):
        with log.open("a") as file:
            file.write("built\\n")
        time.sleep(0.5)
        make(folder)

    print("ready", flush=True)
    while not start.exists():
        time.sleep(0.005)
    print(EngineCache(root).get_or_build("0" * 64, build))
    """
    command = [
        sys.executable,
        "-c",
        textwrap.dedent(code),
        str(cache.root),
        str(tmp_path / "log"),
        str(tmp_path / "go"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    both = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in both:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    (tmp_path / "go").touch()
    printed = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0], printed
    assert {out.strip() for out, _ in printed} == {str(cache.root / ("0" * 64))}
    assert (tmp_path / "log").read_text() == "built\n"


def test_threads_of_one_process_build_once(cache):
    built = []
    found = []

    def build(folder: Path) -> None:
        built.append(folder)
        threading.Event().wait(0.05)
        make(folder)

    threads = [threading.Thread(target=lambda: found.append(cache.get_or_build("1" * 64, build))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1
    assert len(found) == 4


def test_clear_removes_entries_and_leftovers_but_nothing_else_and_nothing_in_work(cache):
    assert cache.clear() == 0
    entry = cache.get_or_build("2" * 64, make)
    (cache.root / "notes.txt").write_text("mine")
    (cache.root / f".{'2' * 64}.0123abcd.partial").mkdir()

    def build(folder: Path) -> None:
        make(folder)
        assert cache.clear() == 1

    working = cache.get_or_build("3" * 64, build)
    assert not entry.exists()
    open_bundle(working)
    assert cache.clear() == 1
    left = {path.name for path in cache.root.iterdir() if path.suffix != ".lock"}
    assert left == {"notes.txt"}


def test_the_folder_comes_from_the_environment_or_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path / "mine"))
    assert EngineCache().root == tmp_path / "mine" / "engines"
    monkeypatch.setenv(ENVIRONMENT, "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tmp_path in EngineCache().root.parents


def test_a_cache_that_cannot_be_written_says_what_to_set(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(BundleError, match=ENVIRONMENT):
        EngineCache(tmp_path / "file" / "cache").get_or_build("4" * 64, make)
