"""Several runs of one engine at a time: how an adapter starts one without waiting for it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from threading import Lock, Thread
from typing import Protocol, TypeAlias

from deploykit.arrays import FloatArray, ImageArray

Wait: TypeAlias = Callable[[], list[FloatArray]]
"""Waits for a run; new arrays in the order of the manifest's outputs."""


class RunQueue(Protocol):
    """Runs that were started, collected in the order in which they were; used by one thread."""

    def start(self, images: ImageArray) -> Wait:
        """Start a run on a copy of the images; at most as many are uncollected as the queue was made for."""
        ...

    def close(self) -> None:
        """Wait for every run that was started, and give the queue's memory back."""
        ...


class ThreadQueue:
    """Runs in threads, for runtimes whose calls go on at once from several of them.

    Args:
        run: what the adapter runs, callable from any thread.
        workers: how many runs go on at a time; those started beyond that wait for a thread.
    """

    def __init__(self, run: Callable[[ImageArray], list[FloatArray]], workers: int) -> None:
        self._started: SimpleQueue[_Run | None] = SimpleQueue()
        self._threads = [
            Thread(target=_work, args=(run, self._started), name=f"deploykit-run-{number}", daemon=True)
            for number in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    def start(self, images: ImageArray) -> Wait:
        """See `RunQueue.start`."""
        started = _Run(images.copy())
        self._started.put(started)
        return started.wait

    def close(self) -> None:
        """See `RunQueue.close`."""
        with suppress(Empty):
            while True:  # what no thread has begun needs no answer
                self._started.get_nowait()
        for _ in self._threads:
            self._started.put(None)
        for thread in self._threads:
            thread.join()


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

    def wait(self) -> list[FloatArray]:
        """Return the outputs once the run has ended, or raise what it raised."""
        self._done.acquire()
        if self._error is not None:
            raise self._error
        return self._outputs


def _work(run: Callable[[ImageArray], list[FloatArray]], started: SimpleQueue[_Run | None]) -> None:
    while (each := started.get()) is not None:
        each.go(run)
