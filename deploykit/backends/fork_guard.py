"""Runs that a fork waits for: a child that inherits a thread pool amid a run can hang when it opens an engine."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from threading import Lock

LONGEST_WAIT = 5.0
"""Seconds that a fork waits at most."""


class ForkGuard:
    """A block that each fork of this process waits for, and that waits for a fork; entered by any number of threads."""

    def __init__(self) -> None:
        self._gate = Lock()
        self._running: list[None] = []
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(
                before=self._close, after_in_parent=self._gate.release, after_in_child=self._open_in_child
            )

    def __enter__(self) -> None:
        with self._gate:
            self._running.append(None)

    def __exit__(self, *_: object) -> None:
        with suppress(IndexError):  # a child has none of its parent's
            self._running.pop()

    def _close(self) -> None:
        self._gate.acquire()
        until = time.monotonic() + LONGEST_WAIT
        while self._running and time.monotonic() < until:
            time.sleep(0.0002)

    def _open_in_child(self) -> None:
        self._running.clear()
        self._gate.release()
