"""Several runs of one engine at a time: how an adapter starts one without waiting for it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeAlias

from deploykit.arrays import FloatArray, ImageArray

Wait: TypeAlias = Callable[[], list[FloatArray]]
"""Waits for a run; new arrays in the order of the manifest's outputs."""


class RunQueue(Protocol):
    """Runs that were started, collected in the order in which they were; used by one thread."""

    def start(self, images: ImageArray) -> Wait:
        """Start a run on images that nobody changes; at most as many are uncollected as the queue was made for."""
        ...

    def close(self) -> None:
        """Wait for every run that was started, and give the queue's memory back."""
        ...


class ThreadQueue:
    """Runs in threads, for runtimes whose calls go on at once from several of them.

    Args:
        run: what the adapter runs, callable from any thread.
        in_flight: how many runs go on at a time.
    """

    def __init__(self, run: Callable[[ImageArray], list[FloatArray]], in_flight: int) -> None:
        self._run = run
        self._pool = ThreadPoolExecutor(in_flight, thread_name_prefix="deploykit-run")

    def start(self, images: ImageArray) -> Wait:
        """See `RunQueue.start`."""
        return self._pool.submit(self._run, images).result

    def close(self) -> None:
        """See `RunQueue.close`."""
        self._pool.shutdown(wait=True, cancel_futures=True)
