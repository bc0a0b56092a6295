"""``deploykit cache``: what is kept, its sizes, what is damaged, and removing it."""

from __future__ import annotations

import pytest

from deploykit.store import Store, address


@pytest.fixture
def store(tmp_path, monkeypatch) -> Store:
    """A store of two entries, one of them with markup and an escape sequence in its title."""
    monkeypatch.setenv("DEPLOYKIT_CACHE", str(tmp_path / "cache"))
    kept = Store()
    kept.save(address("engines", {"n": 1}, title="resnet18 onnxruntime int8"), b"x" * 5000)
    kept.save(address("plans", {"n": 2}, title="[bold]\x1b[31mred"), b"y" * 3000)
    return kept


def damage(store: Store) -> None:
    (file,) = store.root.glob("engines/*/value")
    file.write_bytes(b"z" * 5000)


def test_list_shows_kinds_titles_sizes_and_the_limit(call, store, monkeypatch):
    monkeypatch.setenv("DEPLOYKIT_CACHE_LIMIT", "1MB")
    done = call("cache", "list")
    assert (done.code, done.err) == (0, "")
    assert "resnet18 onnxruntime int8" in done.out
    assert "[bold]\\x1b[31mred" in done.out
    assert "\x1b" not in done.out
    assert "of 1.0 MB" in done.out
    told = call("cache", "list", "--json").json()
    assert {entry["kind"] for entry in told["entries"]} == {"engines", "plans"}
    assert told["bytes"] == sum(entry["bytes"] for entry in told["entries"]) > 8000
    assert (told["root"], told["limit"], told["litter"]) == (str(store.root), 1_000_000, [])


def test_verify_gives_3_where_an_entry_is_damaged(call, store):
    assert call("cache", "verify").code == 0
    damage(store)
    done = call("cache", "verify")
    assert done.code == 3
    assert "another SHA-256" in done.out
    assert done.out.splitlines()[-1] == "Next: deploykit cache prune"
    told = call("cache", "verify", "--json")
    assert (told.code, told.json()["damaged"]) == (3, 1)


def test_prune_removes_the_damaged_and_what_is_above_the_limit(call, store):
    damage(store)
    assert "Removed 1 entries" in call("cache", "prune").out
    assert call("cache", "verify").code == 0
    told = call("cache", "prune", "--limit", "0", "--json").json()["pruned"]
    assert (len(told["entries"]), told["left"]) == (1, 0)


def test_clear_removes_everything(call, store):
    told = call("cache", "clear", "--json").json()["pruned"]
    assert (len(told["entries"]), told["left"]) == (2, 0)
    assert "0 entries" in call("cache", "list").out


def test_a_limit_that_is_no_size_is_bad_usage(call, store, monkeypatch):
    done = call("cache", "prune", "--limit", "much")
    assert (done.code, done.out) == (2, "")
    assert "--limit is 'much'" in done.err
    monkeypatch.setenv("DEPLOYKIT_CACHE_LIMIT", "much")
    assert "DEPLOYKIT_CACHE_LIMIT is 'much'" in call("cache", "list").err


def test_a_cache_that_is_not_there_is_empty(call, tmp_path, monkeypatch):
    monkeypatch.setenv("DEPLOYKIT_CACHE", str(tmp_path / "absent"))
    for command in ("list", "prune", "verify", "clear"):
        assert call("cache", command).code == 0
    assert not (tmp_path / "absent").exists()
