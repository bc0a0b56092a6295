"""ExecuTorch's threads: one pool in a process, which every engine that is open keeps a pointer to."""

from __future__ import annotations

import os
import threading
import weakref

from deploykit.backends.executorch.protocols import Library
from deploykit.errors import SpecError

_LOCK = threading.Lock()
_LEASES: weakref.WeakSet[Lease] = weakref.WeakSet()
_OWNER: list[int] = []
"""The process that made the pool."""


class Lease:
    """An open engine's hold on the pool: while one lives, the pool is not replaced."""

    def __init__(self, threads: int) -> None:
        self.threads = threads


def lease_pool(library: Library, threads: int, *, asked: bool) -> Lease:
    """Return a hold on the pool, of ``threads`` where it can be.

    Args:
        library: the bindings.
        threads: how many the pool should have.
        asked: the user asked for that number; otherwise a pool that is in use is taken as it is.

    Raises:
        SpecError: another engine is open and the pool has another number of threads; or the process is a fork of the
            one whose pool it is.
    """
    with _LOCK:
        current = library._threadpool_get_thread_count()
        _check_process(current)
        if current != threads and not _LEASES:
            library._unsafe_reset_threadpool(threads)
            current = library._threadpool_get_thread_count()
        if current != threads and asked:
            raise SpecError(
                f"threads is {threads}, and ExecuTorch's one pool of this process has {current} threads, which "
                f"{len(_LEASES)} other open engine(s) use. Close those first, or open all with the same threads."
            )
        lease = Lease(current)
        _LEASES.add(lease)
        return lease


def _check_process(threads: int) -> None:
    """Refuse a pool whose threads stayed in the parent process, where a call would hang."""
    if not _OWNER:
        _OWNER.append(os.getpid())
    if _OWNER[0] != os.getpid() and threads > 1:
        raise SpecError(
            f"the process {os.getpid()} is a fork of {_OWNER[0]}, in which ExecuTorch's threads stayed, and a call "
            "would hang. Fix: start the workers with the method 'spawn', or open no executorch engine before the fork."
        )
