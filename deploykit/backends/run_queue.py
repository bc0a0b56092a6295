"""Several runs of one engine at a time: how an adapter starts one without waiting for it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue
from threading import Lock, Thread
from time import perf_counter
from typing import Protocol, TypeAlias

from deploykit.arrays import FloatArray, ImageArray

Wait: TypeAlias = Callable[[], list[FloatArray]]
"""Waits for a run; new arrays in the order of the manifest's outputs."""

BLOCKED_SHARE, BLOCKED_AFTER = 0.1, 0.05
"""A source is slow that keeps its reader waiting for this share of the time, and for so many seconds in all."""


class RunQueue(Protocol):
    """Runs that were started, collected in the order in which they were; used by one thread."""

    def start(self, images: ImageArray) -> Wait:
        """Start a run on a copy of the images; at most as many are uncollected as the queue was made for."""
        ...

    def source_blocked(self, seconds: float) -> None:
        """Hear how long the thread that starts runs has waited for images without computing."""
        ...

    def close(self) -> None:
        """Wait for every run that was started, and give the queue's memory back."""
        ...


class ThreadQueue:
    """Runs in threads, for runtimes whose calls go on at once from several of them.

    With as many threads as processors, the one that reads frames and takes answers takes a processor from a run each
    time that it wakes up. So it can be one of them itself: where it would wait for an answer it runs what no thread has
    begun, unless it would be the only one. While its source keeps it waiting a processor would be idle, so that a slow
    source gets another thread.

    Args:
        run: what the adapter runs, callable from any thread.
        workers: how many runs go on at a time; those started beyond that wait for a thread.
    """

    def __init__(self, run: Callable[[ImageArray], list[FloatArray]], workers: int) -> None:
        self._run = run
        self._helped = workers > 1
        self._started: SimpleQueue[_Run | None] = SimpleQueue()
        self._threads: list[Thread] = []
        self._since, self._blocked = perf_counter(), 0.0
        for _ in range(workers - self._helped):
            self._add_thread()

    def start(self, images: ImageArray) -> Wait:
        """See `RunQueue.start`."""
        started = _Run(images.copy())
        self._started.put(started)
        return partial(self._answer, started)

    def source_blocked(self, seconds: float) -> None:
        """See `RunQueue.source_blocked`; a slow source gets a thread in place of its reader."""
        self._blocked += seconds
        if self._helped and self._blocked > max(BLOCKED_AFTER, BLOCKED_SHARE * (perf_counter() - self._since)):
            self._helped = False
            self._add_thread()

    def close(self) -> None:
        """See `RunQueue.close`."""
        with suppress(Empty):
            while True:  # what no thread has begun needs no answer
                self._started.get_nowait()
        for _ in self._threads:
            self._started.put(None)
        for thread in self._threads:
            thread.join()

    def _add_thread(self) -> None:
        name = f"deploykit-run-{len(self._threads)}"
        thread = Thread(target=_work, args=(self._run, self._started), name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _answer(self, awaited: _Run) -> list[FloatArray]:
        """Wait for a run, and help with others until it has ended."""
        while self._helped and not awaited.has_ended():
            try:
                other = self._started.get_nowait()
            except Empty:
                break
            if other is not None:
                other.go(self._run)
        return awaited.wait()


class _Run:
    """One run: its images until it begins, its outputs or what went wrong when it has ended.

    A lock is what a `concurrent.futures.Future` does with a condition and a list of waiters, which costs a small
    network a tenth of its time.
    """

    __slots__ = ("_done", "_error", "_images", "_outputs")

    def __init__(self, images: ImageArray) -> None:
        self._images: ImageArray | None = images
        self._outputs: list[FloatArray] = []
        self._error: BaseException | None = None
        self._done = Lock()
        self._done.acquire()

    def go(self, run: Callable[[ImageArray], list[FloatArray]]) -> None:
        """Run, and let go whoever waits."""
        images, self._images = self._images, None
        try:
            if images is not None:
                self._outputs = run(images)
        except BaseException as error:  # raised where the run is waited for
            self._error = error
        finally:
            self._done.release()

    def has_ended(self) -> bool:
        """Return whether the run has ended; only the thread that waits for it asks."""
        return not self._done.locked()

    def wait(self) -> list[FloatArray]:
        """Return the outputs once the run has ended, or raise what it raised."""
        self._done.acquire()
        if self._error is not None:
            raise self._error
        return self._outputs


def _work(run: Callable[[ImageArray], list[FloatArray]], started: SimpleQueue[_Run | None]) -> None:
    while (each := started.get()) is not None:
        each.go(run)
