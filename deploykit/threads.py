"""How many threads this process may compute with: the processors that it may run on, quotas and OpenMP's variables."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Literal, TypeAlias, cast, get_args

from deploykit.errors import SpecError

Hint: TypeAlias = Literal["latency", "throughput"]
"""What an engine is opened for: the shortest call, or the most images a second of several calls at a time."""

CGROUPS = Path("/proc/self/cgroup")
MOUNTS = Path("/proc/self/mountinfo")
PROCESSORS = Path("/sys/devices/system/cpu")

MOST_THREADS = 4096

_LIMITS = ("OMP_NUM_THREADS", "OMP_THREAD_LIMIT")


def check_threads(threads: int | None) -> int | None:
    """Return the number of threads that the user asked for.

    Raises:
        SpecError: no whole number from 1 to `MOST_THREADS`.
    """
    if threads is None:
        return None
    if isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= MOST_THREADS:
        raise SpecError(
            f"threads is {threads!r}; expected a whole number from 1 to {MOST_THREADS}, or None for what the process "
            "may use."
        )
    return threads


def checked_hint(hint: str) -> Hint:
    """Return what an engine is opened for.

    Raises:
        SpecError: no such hint.
    """
    if hint not in get_args(Hint):
        raise SpecError(f"hint is {hint!r}; expected 'latency' or 'throughput'.")
    return cast("Hint", hint)


def thread_limit() -> int | None:
    """Return how many threads this process may compute with; None: every processor of the machine, as by default.

    The least of: the processors in its affinity mask (``taskset``), its cgroup's quota of processor time (rounded up),
    ``OMP_NUM_THREADS`` and ``OMP_THREAD_LIMIT``. Processors that share a core count as one, unless the user set a
    number.
    """
    allowed = allowed_processors()
    asked = [limit for limit in map(_environment_limit, _LIMITS) if limit is not None]
    quota = processor_quota()
    whole = len(allowed) >= (os.cpu_count() or 1)
    if whole and not asked and (quota is None or quota >= len(allowed)):
        return None
    limits = [len(allowed), *asked] if asked else [count_cores(allowed)]
    if quota is not None:
        limits.append(max(1, math.ceil(quota)))
    return min(limits)


def allowed_processors() -> frozenset[int]:
    """Return the processors that the operating system lets this process run on."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on every system
    return frozenset(affinity(0)) if affinity else frozenset(range(os.cpu_count() or 1))


def count_cores(processors: frozenset[int], root: Path = PROCESSORS) -> int:
    """Count the cores behind some processors: hyper-threads of one core count once."""
    cores = set()
    for processor in processors:
        try:
            siblings = (root / f"cpu{processor}" / "topology" / "thread_siblings_list").read_text().strip()
        except OSError:
            siblings = str(processor)
        cores.add(siblings)
    return max(1, len(cores))


def processor_quota(cgroups: Path = CGROUPS, mounts: Path = MOUNTS) -> float | None:
    """Return how many processors' time this process's cgroups give it, the least of all levels; None: no quota.

    Reads ``cpu.max`` (version 2) and ``cpu.cfs_quota_us`` (version 1).
    """
    try:
        lines = cgroups.read_text(encoding="utf-8", errors="replace").splitlines()
        folders = _controllers(mounts)
    except OSError:
        return None
    quotas = []
    for line in lines:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        version = "1" if "cpu" in controllers.split(",") else "2" if not controllers else ""
        for mount, root in folders.get(version, ()):
            quotas += [quota for folder in _levels(mount, root, path) if (quota := _quota(folder)) is not None]
    return min(quotas, default=None)


def _controllers(mounts: Path) -> dict[str, list[tuple[Path, str]]]:
    """Where the cpu controller is mounted, by the version of cgroups, and which of its folders the mount shows."""
    found: dict[str, list[tuple[Path, str]]] = {}
    for line in mounts.read_text(encoding="utf-8", errors="replace").splitlines():
        before, _, after = line.partition(" - ")
        fields, kind = before.split(), after.split()
        if len(fields) < 5 or len(kind) < 3:
            continue
        version = {"cgroup2": "2", "cgroup": "1"}.get(kind[0])
        if version == "2" or (version == "1" and "cpu" in kind[2].split(",")):
            place = (Path(_unescaped(fields[4])), _unescaped(fields[3]))
            found.setdefault(str(version), []).append(place)
    return found


def _levels(mount: Path, root: str, path: str) -> Iterator[Path]:
    """Yield the folder of a cgroup below a mount, and every folder above it; the mount's own where it shows a part."""
    inside = PurePosixPath(path)
    if inside.is_relative_to(root) and ".." not in inside.parts:
        relative = inside.relative_to(root)
        for level in (relative, *relative.parents):
            yield mount / level
    else:
        yield mount  # a container, which sees its own cgroup as the root


def _quota(folder: Path) -> float | None:
    try:
        limit, period = (folder / "cpu.max").read_text().split()[:2]
    except (OSError, ValueError):
        try:
            limit, period = ((folder / name).read_text().strip() for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us"))
        except (OSError, ValueError):
            return None
    try:
        return int(limit) / int(period) if int(limit) > 0 and int(period) > 0 else None
    except ValueError:  # "max"
        return None


def _environment_limit(name: str) -> int | None:
    """The number in one of OpenMP's variables, the first of a list; None where there is none that OpenMP takes."""
    match = re.match(r"\s*\+?(\d+)\s*(,|$)", os.environ.get(name, ""))
    return int(match.group(1)) or None if match else None


def _unescaped(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match.group(1), 8)), text)
