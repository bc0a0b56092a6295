"""How many threads a process may use: its mask, its cgroups and OpenMP's variables, whichever is the least."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploykit import threads
from deploykit.errors import SpecError
from deploykit.threads import check_threads, count_cores, processor_quota, thread_limit


@pytest.fixture
def machine(monkeypatch):
    """A machine of eight processors without a quota, and no variable set."""

    def set_up(*, allowed: int = 8, quota: float | None = None, **environment: str) -> int | None:
        for name in ("OMP_NUM_THREADS", "OMP_THREAD_LIMIT"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(threads.os, "cpu_count", lambda: 8)
        monkeypatch.setattr(threads, "allowed_processors", lambda: frozenset(range(allowed)))
        monkeypatch.setattr(threads, "count_cores", lambda processors: (len(processors) + 1) // 2)
        monkeypatch.setattr(threads, "processor_quota", lambda: quota)
        return thread_limit()

    return set_up


def test_the_ordinary_case_is_left_to_the_runtime(machine):
    assert machine() is None
    assert machine(quota=8.0) is None


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"allowed": 4}, 2),  # two cores, each with two hyper-threads
        ({"allowed": 1}, 1),
        ({"quota": 3.0}, 3),
        ({"quota": 1.5}, 2),
        ({"quota": 0.2}, 1),
        ({"allowed": 2, "quota": 6.0}, 1),
        ({"OMP_NUM_THREADS": "1"}, 1),
        ({"OMP_NUM_THREADS": "6"}, 6),  # more than the cores: the user said so
        ({"OMP_NUM_THREADS": "3,2"}, 3),
        ({"OMP_NUM_THREADS": " 2 "}, 2),
        ({"OMP_NUM_THREADS": "64"}, 8),
        ({"OMP_NUM_THREADS": "6", "OMP_THREAD_LIMIT": "2"}, 2),
        ({"OMP_NUM_THREADS": "4", "allowed": 3}, 3),
        ({"OMP_NUM_THREADS": "4", "quota": 2.0}, 2),
    ],
)
def test_the_least_limit_counts(machine, limits, expected):
    assert machine(**limits) == expected


@pytest.mark.parametrize("value", ["", "many", "0", "-3", "2.5"])
def test_a_variable_that_openmp_does_not_take_limits_nothing(machine, value):
    assert machine(OMP_NUM_THREADS=value) is None


@pytest.mark.parametrize("value", [0, -1, 1.0, "2", True])
def test_a_number_of_threads_is_a_whole_number_from_one(value):
    with pytest.raises(SpecError, match="threads is"):
        check_threads(value)


def quota_of(tmp_path: Path, cgroup: str, mounts: list[str], files: dict[str, str]) -> float | None:
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    (tmp_path / "cgroup").write_text(cgroup)
    (tmp_path / "mounts").write_text("\n".join(mounts))
    return processor_quota(tmp_path / "cgroup", tmp_path / "mounts")


def mount(tmp_path: Path, version: int, root: str = "/", options: str = "rw,cpu,cpuacct") -> str:
    kind = "cgroup2 cgroup2 rw" if version == 2 else f"cgroup cgroup {options}"
    return f"31 23 0:28 {root} {tmp_path / 'v'}{version} rw,relatime - {kind}"


def test_a_quota_of_version_2_is_the_least_of_all_levels(tmp_path):
    files = {"v2/a/b/cpu.max": "400000 100000\n", "v2/a/cpu.max": "150000 100000\n", "v2/cpu.max": "max 100000\n"}
    assert quota_of(tmp_path, "0::/a/b\n", [mount(tmp_path, 2)], files) == 1.5


def test_a_quota_of_version_1(tmp_path):
    files = {"v1/a/cpu.cfs_quota_us": "50000\n", "v1/a/cpu.cfs_period_us": "100000\n", "v1/cpu.cfs_quota_us": "-1\n"}
    files |= {"v1/cpu.cfs_period_us": "100000\n"}
    assert quota_of(tmp_path, "3:memory:/x\n2:cpu,cpuacct:/a\n", [mount(tmp_path, 1)], files) == 0.5


def test_a_container_sees_its_own_cgroup_as_the_root(tmp_path):
    files = {"v2/cpu.max": "200000 100000\n"}
    mounts = ["a line of another form", mount(tmp_path, 2, root="/docker/abc")]
    assert quota_of(tmp_path, "0::/docker/abc\n", mounts, files) == 2.0
    assert quota_of(tmp_path, "0::/../elsewhere\n", mounts, files) == 2.0


def test_no_cgroups_and_no_quota_are_no_limit(tmp_path):
    assert processor_quota(tmp_path / "absent", tmp_path / "absent") is None
    assert quota_of(tmp_path, "0::/\n", [mount(tmp_path, 2)], {"v2/cpu.max": "max 100000"}) is None
    assert quota_of(tmp_path, "2:memory:/\n", [mount(tmp_path, 1, options="rw,memory")], {}) is None


def test_hyper_threads_of_one_core_count_once(tmp_path):
    for processor, siblings in enumerate(("0,2", "1,3", "0,2", "1,3")):
        folder = tmp_path / f"cpu{processor}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{siblings}\n")
    assert count_cores(frozenset({0, 1, 2, 3}), tmp_path) == 2
    assert count_cores(frozenset({0, 2}), tmp_path) == 1
    assert count_cores(frozenset({5, 6}), tmp_path) == 2  # unknown ones count each
