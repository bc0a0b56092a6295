"""A store on a machine without a home folder, out of open files, or with odd entries."""

from __future__ import annotations

import errno
import json
import logging
import os

import pytest

from deploykit import places, store_entry, store_folder
from deploykit import store as store_module
from deploykit.errors import StorageError
from deploykit.places import CACHE
from deploykit.store import Store
from deploykit.store_folder import own_folder
from tests.test_store import OTHER, WHERE, build, made, names, never


@pytest.fixture(autouse=True)
def tell_again(monkeypatch):
    monkeypatch.setattr(places, "_told", set())
    monkeypatch.setattr(store_module, "_swept", set())


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "cache")


def test_without_a_folder_everything_is_made_and_nothing_kept(monkeypatch):
    monkeypatch.setattr(store_module, "cache_root", lambda: None)
    store = Store()
    folder = made(store)
    assert not folder.exists()
    store.save(OTHER, b"x")
    assert store.load(OTHER) is None
    store.remove(OTHER)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EIO])
def test_an_error_of_the_machine_is_said_and_no_damage(store, monkeypatch, caplog, number):
    """The entry stays: another time it is read."""
    folder = made(store)

    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(store_entry, "read_plain", refuse)
        assert store.load(WHERE) is None
        assert f"cannot be used, and nothing is kept in it: [Errno {number}]" in caplog.text
    assert made(store, builder=never) == folder


def test_a_record_that_is_no_record_is_made_again(store, caplog):
    folder = made(store)
    text = json.dumps({"schema": "one"}).encode()
    (folder / store_entry.RECORD).write_bytes(text)
    (folder / store_entry.RECORD_DIGEST).write_bytes(store_entry._digest_line(text))
    made(store)
    assert f"{store_entry.RECORD} is not readable" in caplog.text


def test_an_entry_in_which_a_folder_stands_for_its_record_is_made_again(store, caplog):
    folder = made(store)
    (folder / store_entry.RECORD).unlink()
    (folder / store_entry.RECORD).mkdir(mode=0o700)
    made(store)
    assert "is not used and made again" in caplog.text


def test_a_builder_that_finds_its_own_disk_full_names_the_variable_too(store):
    def full(folder):
        raise StorageError("the folder /scratch cannot be used: the disk is full.")

    with pytest.raises(StorageError, match=rf"/scratch.*It is below the cache .*: set {CACHE} to a folder on another"):
        made(store, builder=full)
    assert names(store.root / "engines") == []


def test_a_builders_own_missing_file_is_not_the_stores(store):
    def lost(folder):
        (folder / "absent").read_bytes()

    with pytest.raises(FileNotFoundError):
        made(store, builder=lost)


def test_what_cannot_be_written_is_not_kept_and_said(store, caplog):
    def full(folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    store.put(WHERE, full)
    assert "nothing is kept in it: [Errno 28]" in caplog.text
    assert names(store.root / "engines") == []


def test_a_folder_of_entries_that_others_could_read_is_closed(tmp_path):
    (tmp_path / "kind").mkdir()
    (tmp_path / "kind").chmod(0o755)
    assert own_folder(tmp_path / "kind").stat().st_mode & 0o777 == 0o700
    (tmp_path / "link").symlink_to(tmp_path / "kind")
    with pytest.raises((PermissionError, FileExistsError)):
        own_folder(tmp_path / "link")


def test_locks_that_the_file_system_has_not_let_entries_be_read_and_spare_those_in_use(store, monkeypatch):
    folder = made(store)
    monkeypatch.setattr(store_folder, "try_lock", lambda handle, **_: None)
    assert made(store, builder=never) == folder
    assert not store_folder.remove_entry(folder), "another process may use it: it was used just now"
    os.utime(folder, (0, 0))
    assert store_folder.remove_entry(folder)


def test_an_entry_that_goes_while_it_is_opened_is_made_again(store, monkeypatch):
    folder = made(store)
    lock = store_folder.try_lock

    def vanish(handle, **options):
        if folder.exists():
            folder.rename(folder.with_name("elsewhere"))
        return lock(handle, **options)

    monkeypatch.setattr(store_folder, "try_lock", vanish)
    assert store_folder.hold(folder, shared=True) is None
    monkeypatch.undo()
    made(store)


def test_links_in_an_entry_are_not_followed_when_it_is_closed_to_others(store, tmp_path):
    (tmp_path / "outside").write_text("x")
    (tmp_path / "outside").chmod(0o644)

    def with_link(folder):
        build(folder)
        (folder / "link").symlink_to(tmp_path / "outside")

    with store.opened(WHERE, with_link) as folder:
        assert (folder / "inner" / "model.bin").is_file()
    assert (tmp_path / "outside").stat().st_mode & 0o777 == 0o644
