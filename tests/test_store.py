"""One store: made once, whole or not at all, proved on reading, of one user, within a limit, without litter."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from pathlib import Path

import pytest

from deploykit import places, store_entry, store_upkeep
from deploykit import store as store_module
from deploykit.errors import SpecError, StorageError
from deploykit.places import CACHE
from deploykit.spec import Fp16, Fp32, Int8
from deploykit.store import Store, address
from deploykit.store_upkeep import LIMIT, clear, entries, leftovers, parse_size, prune
from tests.test_bundle import ROOT

WHERE = address("engines", {"name": "tiny"}, title="tiny engine")
OTHER = address("engines", {"name": "other"}, title="other engine")


@pytest.fixture(autouse=True)
def tell_again(monkeypatch):
    monkeypatch.setattr(places, "_told", set())
    monkeypatch.setattr(store_module, "_swept", set())


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "cache")


def build(folder: Path, content: bytes = b"engine") -> None:
    (folder / "inner").mkdir()
    (folder / "inner" / "model.bin").write_bytes(content * 100)
    (folder / "plan.json").write_text("{}")


def never(folder: Path) -> None:
    raise AssertionError(f"{folder} was built again")


def made(store: Store, where=WHERE, builder=build) -> Path:
    with store.opened(where, builder) as folder:
        assert (folder / "inner" / "model.bin").is_file()
        return folder


def run_python(code: str, *arguments: object, **options) -> subprocess.CompletedProcess[str]:
    prelude = "import os, signal, sys, time\nfrom pathlib import Path\nimport tests.test_store as t\n"
    return subprocess.run(
        [sys.executable, "-c", prelude + textwrap.dedent(code), *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        **options,
    )


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- keys


def test_a_key_is_the_same_in_every_process_and_order():
    parts = {"name": "resnet50", "precision": Int8(), "shape": (1, 3, 224, 224), "options": {"b": 1.5, "a": None}}
    key = address("engines", parts).key
    assert key == address("engines", dict(reversed(parts.items()))).key
    assert key == address("engines", parts | {"shape": [1, 3, 224, 224]}).key
    code = """
    parts = {"name": "resnet50", "precision": t.Int8(), "shape": (1, 3, 224, 224), "options": {"a": None, "b": 1.5}}
    print(t.address("engines", parts).key)
    """
    assert run_python(code).stdout.strip() == key


def test_every_difference_makes_another_key():
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
        {"a": Int8(percentile=99.0)},
    ]
    keys = {address(kind, each).key for each in parts for kind in ("engines", "plans")}
    assert len(keys) == 2 * len(parts)


@pytest.mark.parametrize("value", [Path("weights.pth"), b"bytes", {1, 2}, {1: 2}, object(), [1, {"x": len}]])
def test_a_part_without_a_stable_text_is_refused_by_name(value):
    with pytest.raises(SpecError, match=r"parts\.weights"):
        address("engines", {"weights": value})


@pytest.mark.parametrize("kind", ["", "../x", "Engines", "a/b", ".engines"])
def test_a_kind_that_is_no_folder_name_is_refused(kind):
    with pytest.raises(SpecError, match="kind"):
        address(kind, {})


# ---- made once, whole or not at all


def test_an_entry_is_made_once_and_then_found(store):
    folder = made(store)
    assert made(store, builder=never) == folder
    assert made(Store(store.root), builder=never) == folder
    assert made(store, OTHER) != folder
    assert names(store.root / "engines") == sorted([WHERE.key, OTHER.key])


def test_folders_are_of_this_user_alone_whatever_the_umask(store):
    before = os.umask(0)
    try:
        folder = made(store)
    finally:
        os.umask(before)
    for path in (store.root, store.root / "engines", folder, folder / "inner"):
        assert path.stat().st_mode & 0o777 == 0o700, path
    for path in folder.rglob("*"):
        assert path.is_dir() or path.stat().st_mode & 0o777 == 0o600, path


def test_a_failed_build_leaves_nothing_and_can_be_tried_again(store):
    with pytest.raises(AssertionError, match="built again"):
        made(store, builder=never)
    assert names(store.root / "engines") == []
    made(store)


def test_a_value_is_kept_replaced_and_forgotten(store):
    where = address("modes", {"work": 1})
    assert store.load(where) is None
    store.save(where, b"first")
    store.save(where, b"second")
    assert Store(store.root).load(where) == b"second"
    store.remove(where)
    store.remove(where)
    assert store.load(where) is None
    assert names(store.root / "modes") == []


def test_eight_processes_build_once(store, tmp_path):
    code = """
    root, log, start = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])

    def build(folder):
        with log.open("a") as file:
            file.write("built\\n")
        time.sleep(0.5)
        t.build(folder)

    print("ready", flush=True)
    while not start.exists():
        time.sleep(0.005)
    print(t.made(t.Store(root), builder=build))
    """
    prelude = "import sys, time\nfrom pathlib import Path\nimport tests.test_store as t\n"
    command = [sys.executable, "-c", prelude + textwrap.dedent(code), store.root, tmp_path / "log", tmp_path / "go"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            list(map(str, command)), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(8)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    (tmp_path / "go").touch()
    printed = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0] * 8, printed
    assert {out.strip() for out, _ in printed} == {str(store.root / "engines" / WHERE.key)}
    assert (tmp_path / "log").read_text() == "built\n"
    assert names(store.root / "engines") == [WHERE.key]


def test_threads_of_one_process_build_once(store):
    built, found = [], []

    def slowly(folder: Path) -> None:
        built.append(folder)
        time.sleep(0.05)
        build(folder)

    threads = [threading.Thread(target=lambda: found.append(made(store, builder=slowly))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(built), len(set(found)), len(found)) == (1, 1, 4)


@pytest.mark.parametrize("moment", ["building", "sealed", "renamed"])
def test_a_kill_leaves_nothing_half_made_and_its_litter_goes_at_the_next_use(store, moment):
    code = f"""
    def die(*_, **__):
        os.kill(os.getpid(), signal.SIGKILL)
    place = t.store_module.put_in_place
    def placed(*arguments):
        place(*arguments)
        die()
    if {moment!r} == "sealed":
        t.store_module.put_in_place = die
    elif {moment!r} == "renamed":
        t.store_module.put_in_place = placed
    t.made(t.Store(Path(sys.argv[1])), builder=die if {moment!r} == "building" else t.build)
    """
    assert run_python(code, store.root).returncode == -signal.SIGKILL
    assert len(leftovers(store.root)) == (1 if moment == "renamed" else 2)
    other = address("plans", {})
    store.save(other, b"")  # another entry of another kind: the next use, whichever it is
    assert leftovers(store.root) == []
    made(store, builder=never if moment == "renamed" else build)


def test_what_a_living_process_makes_is_not_swept(store, monkeypatch):
    def build_beside(folder: Path) -> None:
        build(folder)
        monkeypatch.setattr(store_module, "_swept", set())
        made(Store(store.root), OTHER)
        assert prune(store.root, None).litter == 0
        assert folder.is_dir()

    made(store, builder=build_beside)


# ---- proved on reading


def swap(store: Store) -> None:
    """Each of two entries takes the other's place, as a mistaken copy or an attacker leaves them."""
    one, two = (store.root / "engines" / where.key for where in (WHERE, OTHER))
    one.rename(one.with_name("aside"))
    two.rename(one)
    one.with_name("aside").rename(two)


def swap_files(store: Store) -> None:
    one, two = (store.root / "engines" / where.key / "inner" for where in (WHERE, OTHER))
    one.rename(one.with_name("aside"))
    two.rename(one)
    one.with_name("aside").rename(two)


def rename_in_record(store: Store) -> None:
    """The other's whole entry, its record claiming this key, with a digest that fits."""
    swap(store)
    path = store.root / "engines" / WHERE.key / store_entry.RECORD
    text = json.dumps(json.loads(path.read_text()) | {"key": WHERE.key}).encode()
    path.write_bytes(text)
    path.with_name(store_entry.RECORD_DIGEST).write_bytes(store_entry._digest_line(text))


def add_file(store: Store) -> None:
    (store.root / "engines" / WHERE.key / "inner" / "more.so").write_bytes(b"code")


def remove_file(store: Store) -> None:
    (store.root / "engines" / WHERE.key / "plan.json").unlink()


def link_file(store: Store) -> None:
    file = store.root / "engines" / WHERE.key / "plan.json"
    file.rename(store.root / "elsewhere")
    file.symlink_to(store.root / "elsewhere")


def pipe(store: Store) -> None:
    file = store.root / "engines" / WHERE.key / "plan.json"
    file.unlink()
    os.mkfifo(file)


def pipe_for_record(store: Store) -> None:
    file = store.root / "engines" / WHERE.key / store_entry.RECORD
    file.unlink()
    os.mkfifo(file)


def file_for_entry(store: Store) -> None:
    shutil.rmtree(store.root / "engines" / WHERE.key)
    (store.root / "engines" / WHERE.key).write_text("x")


def writable_by_others(store: Store) -> None:
    (store.root / "engines" / WHERE.key).chmod(0o777)


def file_writable_by_others(store: Store) -> None:
    (store.root / "engines" / WHERE.key / "inner" / "model.bin").chmod(0o666)


@pytest.mark.parametrize(
    "harm",
    [
        swap,
        swap_files,
        rename_in_record,
        add_file,
        remove_file,
        link_file,
        pipe,
        pipe_for_record,
        file_for_entry,
        writable_by_others,
        file_writable_by_others,
    ],
)
def test_an_entry_that_does_not_prove_itself_is_made_again(store, harm, caplog):
    made(store)
    made(store, OTHER, lambda folder: build(folder, b"others"))
    harm(store)
    begun = time.monotonic()
    with caplog.at_level(logging.WARNING, logger="deploykit"):
        folder = made(store)
    assert time.monotonic() - begun < 10
    assert (folder / "inner" / "model.bin").read_bytes() == b"engine" * 100
    if harm is not file_for_entry:
        assert "is not used and made again" in caplog.text
    made(store, builder=never)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("name", [".", "entry.json", "inner", "inner/model.bin"])
def test_what_another_user_owns_is_not_used(store, name, caplog):
    folder = made(store)
    os.chown(folder / name, 12345, 12345)
    built = []
    made(store, builder=lambda folder: built.append(1) or build(folder))
    assert built
    assert "belongs to user 12345" in caplog.text


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_two_users_of_one_folder_have_an_entry_each():
    with tempfile.TemporaryDirectory() as folder:
        shared = Path(folder)
        shared.chmod(0o1777)
        assert made(Store(shared)).parent.parent == shared / "user-0"
        code = """
        import fcntl
        os.setgid(12345), os.setuid(12345)
        print(t.made(t.Store(Path(sys.argv[1]))).parent.parent.name)
        """
        done = run_python(code, shared)
        assert done.stdout.strip() == "user-12345", done.stderr
        with Store(shared).opened(WHERE, never):
            pass


def test_every_flipped_bit_is_noticed(store):
    folder = made(store)
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        good = path.read_bytes()
        for position in range(0, len(good), max(1, len(good) // 25)):
            bad = bytearray(good)
            bad[position] ^= 1 << position % 8
            path.write_bytes(bad)
            with store.found(WHERE) as found:
                assert found is None, (path, position)
        path.write_bytes(good)
    made(store, builder=never)


def test_a_caller_can_say_what_does_not_fit(store, caplog):
    made(store)
    with store.opened(WHERE, lambda folder: build(folder, b"newer"), lambda folder: "it is too old") as folder:
        assert (folder / "inner" / "model.bin").read_bytes() == b"newer" * 100
    assert "it is too old" in caplog.text


def test_a_record_without_end_is_not_read(store, monkeypatch):
    folder = made(store)
    with (folder / store_entry.RECORD).open("r+b") as file:
        file.truncate(8 << 30)
    with store.found(WHERE) as found:
        assert found is None


# ---- within a limit


def test_the_least_recently_used_go_first(store, monkeypatch):
    monkeypatch.setenv(LIMIT, "2500")
    wheres = [address("engines", {"n": number}) for number in range(3)]
    made(store, wheres[0])
    made(store, wheres[1])
    made(store, wheres[0])
    made(store, wheres[2])
    assert names(store.root / "engines") == sorted([wheres[0].key, wheres[2].key])
    assert sum(entry.bytes for entry in entries(store.root)) <= 2500


def test_an_entry_in_use_is_never_removed(store, monkeypatch):
    monkeypatch.setenv(LIMIT, "0")
    with store.opened(WHERE, build) as folder:
        made(store, OTHER)
        assert (folder / "inner" / "model.bin").is_file()
        assert clear(store.root).left > 0
        assert (folder / "inner" / "model.bin").is_file()
    clear(store.root)
    assert list(entries(store.root)) == []


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("1500", 1500),
        ("500MB", 500_000_000),
        ("20 GB", 20_000_000_000),
        ("1.5GiB", 3 << 29),
        ("2k", 2000),
        ("none", None),
    ],
)
def test_sizes_are_read_as_people_write_them(text, size):
    assert parse_size(text, "--limit") == size


@pytest.mark.parametrize("text", ["much", "-1", "1XB", "", "GB", "nan", "1e9"])
def test_another_size_is_refused_by_the_variables_name(text, monkeypatch):
    with pytest.raises(SpecError, match="--limit is"):
        parse_size(text, "--limit")


# ---- upkeep


def test_prune_removes_the_damaged_and_what_version_0_1_0_left(store):
    folder = made(store)
    made(store, OTHER)
    (folder / "plan.json").write_text("{!")
    old = store.root / "engines" / ("0" * 64)
    old.mkdir()
    (old / "manifest.json").write_text("{}")
    for name in (f"engines/{'1' * 64}.lock", f"plans/{'2' * 64}.statistics", "plans/plan-abcd1234/x", "notes/mine.txt"):
        (store.root / name).parent.mkdir(parents=True, exist_ok=True)
        (store.root / name).write_text("x")
    pruned = prune(store.root, None)
    assert {entry.key for entry in pruned.entries} == {WHERE.key, "0" * 64}
    assert pruned.litter == 3
    assert names(store.root / "engines") == [OTHER.key]
    assert (store.root / "notes" / "mine.txt").read_text() == "x"
    assert pruned.left == next(entries(store.root)).bytes


def test_clear_leaves_only_what_is_not_the_stores(store):
    made(store)
    store.save(address("plans", {}), b"x")
    (store.root / "engines" / "mine.txt").write_text("x")
    assert len(clear(store.root).entries) == 2
    left = {path.relative_to(store.root).as_posix() for path in store.root.rglob("*")}
    assert left == {"engines", "engines/mine.txt"}


def test_an_absent_store_is_empty(tmp_path):
    assert list(entries(tmp_path / "absent")) == []
    assert clear(tmp_path / "absent").entries == ()


# ---- places


def test_the_folder_comes_from_the_environment_or_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv(CACHE, str(tmp_path / "mine"))
    assert Store().root == tmp_path / "mine"
    monkeypatch.setenv(CACHE, "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tmp_path in Store().root.parents


@pytest.mark.parametrize("place", ["file", "file/below", "read-only"])
def test_a_store_that_cannot_be_written_is_done_without_and_said(tmp_path, place, caplog):
    (tmp_path / "file").write_text("x")
    if place == "read-only":
        if not Path("/proc/sys").is_dir() or os.access("/proc/sys", os.W_OK) is None:
            pytest.skip("needs /proc")
        place = "/proc/sys/deploykit"
    store = Store(tmp_path / place)
    folder = made(store)
    assert not folder.exists()
    store.save(OTHER, b"x")
    assert store.load(OTHER) is None
    assert CACHE in caplog.text
    assert len([record for record in caplog.records if "cannot be used" in record.message]) <= 2


def test_a_disk_that_is_full_while_an_entry_is_made_names_the_variable(store):
    def full(folder: Path) -> None:
        Path("/dev/full").write_bytes(b"x" * 100_000)

    with pytest.raises(StorageError, match=f"the disk is full.*{CACHE}"):
        made(store, builder=full)
    assert names(store.root / "engines") == []


def test_an_entry_that_cannot_be_put_in_place_is_used_and_not_kept(store, monkeypatch, caplog):
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store_module, "put_in_place", refuse)
    made(store)
    assert "No space left" in caplog.text
    assert names(store.root / "engines") == []


def test_another_maker_is_waited_for_and_then_gone_without(store, monkeypatch, caplog):
    monkeypatch.setattr(store_module, "BUILD_WAIT_SECONDS", 0.3)

    def build_beside(folder: Path) -> None:
        build(folder)
        beside = made(Store(store.root))
        assert store.root not in beside.parents

    made(store, builder=build_beside)
    assert "Waiting to make the entry engines/" in caplog.text
    assert f"process {os.getpid()}" in caplog.text
    assert store_upkeep.leftovers(store.root) == []
