from __future__ import annotations

import numpy as np
import pytest

from deploykit.npz import read_npz

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
