"""Folders for what is kept and for scratch files: where they are, and what is said where there are none."""

from __future__ import annotations

import errno
import logging
import pwd
import tempfile
from pathlib import Path

import pytest

from deploykit import places
from deploykit.errors import SpecError, StorageError
from deploykit.places import CACHE, SCRATCH, cache_root, scratch_folder, scratch_root


@pytest.fixture
def homeless(monkeypatch):
    """A process of a user without a home folder, as in a container with a number for a user."""

    def unknown(number):
        raise KeyError(number)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(places, "_told", set())
    for name in ("HOME", "XDG_CACHE_HOME", CACHE):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("homeless")
def test_without_a_home_folder_nothing_is_kept_and_that_is_said_once(caplog):
    with caplog.at_level(logging.WARNING):
        assert cache_root(tell=False) is None
        assert not caplog.records
        assert cache_root() is None
        assert cache_root() is None
    assert len(caplog.records) == 1
    assert f"Set {CACHE} to a writable folder" in caplog.text


@pytest.mark.usefixtures("homeless")
def test_a_cache_in_a_home_folder_that_there_is_not_is_refused(monkeypatch):
    monkeypatch.setenv(CACHE, "~/kept")
    with pytest.raises(SpecError, match=rf"{CACHE} is '~/kept', and there is no home folder.*to an absolute path"):
        cache_root()
    monkeypatch.setenv(CACHE, "/kept")
    assert cache_root() == Path("/kept")


def test_a_machine_without_a_folder_for_temporary_files_is_told_the_variable(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(tmp_path / "absent")])
    with pytest.raises(StorageError, match=rf"there is no folder for temporary files.*Fix: set {SCRATCH} to a folder"):
        scratch_root()


def test_a_scratch_folder_that_cannot_be_made_is_told(tmp_path):
    told = pytest.raises(StorageError, match=rf"absent cannot be used.*set {SCRATCH} to another folder")
    with told, scratch_folder("test", below=tmp_path / "absent"):
        pass


def test_a_full_disk_below_a_scratch_folder_is_told_and_the_folder_goes(tmp_path):
    told = pytest.raises(StorageError, match=rf"cannot be used: the disk is full.*set {SCRATCH} to another folder")
    with told, scratch_folder("test", below=tmp_path) as folder:
        (folder / "half").write_text("x")
        raise OSError(errno.ENOSPC, "No space left on device", str(folder / "half"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "/elsewhere/file"),
        FileNotFoundError(errno.ENOENT, "No such file or directory", "model.onnx"),
    ],
    ids=["another disk is full", "a file is missing"],
)
def test_other_errors_beside_a_scratch_folder_stay_as_they_are(tmp_path, error):
    with pytest.raises(OSError) as caught, scratch_folder("test", below=tmp_path):
        raise error
    assert caught.value is error
    assert list(tmp_path.iterdir()) == []
