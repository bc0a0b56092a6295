from __future__ import annotations

import errno
import os
import resource
import zipfile

import numpy as np
import pytest

from deploykit.errors import StorageError
from deploykit.npz import bundled_arrays, open_npz, read_npz

ARRAYS = {"first": np.arange(6, dtype=np.float32).reshape(2, 3), "second": np.array(["a", "bc"])}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "arrays.npz"
    np.savez(path, **ARRAYS)
    return path


def test_every_array_is_read_by_its_name(file):
    found = read_npz(file)
    assert found.keys() == ARRAYS.keys()
    for name, expected in ARRAYS.items():
        np.testing.assert_array_equal(found[name], expected)


def test_a_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_npz(tmp_path / "absent.npz")


def test_nothing_is_unpickled(tmp_path):
    path = tmp_path / "arrays.npz"
    np.savez(path, pickled=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="not a readable"):
        read_npz(path)


def test_any_damage_is_a_value_error_or_changes_what_is_read_alone(file):
    whole, refused = file.read_bytes(), 0
    for position in range(len(whole)):
        for value in (0, 255, whole[position] ^ 16, ord("(")):
            file.write_bytes(whole[:position] + bytes([value]) + whole[position + 1 :])
            try:
                read_npz(file)
            except ValueError:
                refused += 1
    assert refused > len(whole)
    for size in range(0, len(whole), 50):
        file.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="not a readable"):
            read_npz(file)


def test_only_what_is_asked_for_is_read(tmp_path):
    path = tmp_path / "arrays.npz"
    np.savez_compressed(path, wanted=np.arange(3), other=np.zeros(50_000_000, np.float32))
    with open_npz(path, limit=1000) as arrays:
        np.testing.assert_array_equal(arrays["wanted"], np.arange(3))
        assert list(arrays) == ["wanted", "other"]
        with pytest.raises(ValueError, match="expected at most 1000"):
            arrays["other"]
        with pytest.raises(KeyError):
            arrays["absent"]


def test_arrays_together_are_held_against_the_limit(tmp_path):
    path = tmp_path / "arrays.npz"
    np.savez(path, **{f"a{number}": np.zeros(100, np.uint8) for number in range(11)})
    assert len(read_npz(path, limit=1100)) == 11
    with pytest.raises(ValueError, match="expected at most 1099"):
        read_npz(path, limit=1099)


def with_header(path, header: str, size: int = 8) -> None:
    """An array whose header says what it likes, in an archive that says how many bytes there are."""
    text = header.encode() + b" " * (-(len(header) + 11) % 64) + b"\n"
    data = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(size)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", data)


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1000000, 1000000, 1000000), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (-2,), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (3,), }",
        "{'descr': '|V2000000000', 'fortran_order': False, 'shape': (5,), }",
        "{'descr': '|O', 'fortran_order': False, 'shape': (1,), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1,), }",
    ],
)
def test_a_header_that_does_not_fit_its_bytes_allocates_nothing(tmp_path, header):
    path = tmp_path / "arrays.npz"
    with_header(path, header)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="not a readable"):
        read_npz(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "arrays.npz")
    with pytest.raises(ValueError, match="named pipe"):
        read_npz(tmp_path / "arrays.npz")


def test_names_are_known_without_reading_and_every_version_of_a_header_is_read(tmp_path):
    path = tmp_path / "arrays.npz"
    with zipfile.ZipFile(path, "w") as archive:
        for version in ((1, 0), (2, 0), (3, 0)):
            with archive.open(f"v{version[0]}.npy", "w") as member:
                np.lib.format.write_array(member, ARRAYS["first"], version=version)
        archive.writestr("readme.txt", "no array")
    with open_npz(path, limit=3 * ARRAYS["first"].nbytes) as arrays:
        assert "v3" in arrays
        assert "readme.txt" not in arrays
        assert len(arrays) == 3
        for name in arrays:
            np.testing.assert_array_equal(arrays[name], ARRAYS["first"])


@pytest.mark.parametrize(
    "error", [OSError(errno.EMFILE, "Too many open files"), MemoryError()], ids=["files", "memory"]
)
def test_what_the_machine_lacks_is_no_damage(file, monkeypatch, error):
    def refuse(*_):
        raise error

    monkeypatch.setattr(zipfile, "ZipFile", refuse)
    with pytest.raises(type(error)):
        read_npz(file)
    if isinstance(error, OSError):
        with pytest.raises(StorageError, match="Raise the limit"), bundled_arrays("the baseline", file):
            pass
